"""Real agent processes: start, stop, kill, restart, and a swap under load."""

from __future__ import annotations

import fcntl
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry

from cloud.releases.blobs import Blob
from cloud.releases.repository import Repository
from edge.agent import AgentConfig, run
from edge.process import listen_address, locked
from edge.student.bundle import digest_of, list_files
from protos.errors import InvalidInputError
from protos.v1 import device_pb2, fleet_pb2, fleet_pb2_grpc, release_pb2

if TYPE_CHECKING:
    from tests.agent.agent_process import FIRST, config, make_bundle, open_student
else:
    from agent_process import FIRST, config, make_bundle, open_student

Json = dict[str, Any]
Eventually = Callable[[Callable[[], object]], None]


class Home:
    """A folder with a bundle and a trusted root, and the agents that were started in it."""

    def __init__(self, root: Path, broker: str, eventually: Eventually) -> None:
        self.root = root
        self.bundle = root / "bundle"
        self.student = make_bundle(self.bundle, "")
        self.options: Json = {
            "state": str(root / "state"),
            "device": "kitchen-1",
            "channel": "home",
            "student": str(self.bundle),
            "trust": str(root / "cloud" / "tuf" / "root.json"),
            "broker": broker,
            "cloud": "127.0.0.1:1",
            "listen": "127.0.0.1:0",
            "metrics": "127.0.0.1:0",
        }
        self.repository = Repository(
            state=root / "cloud", clock=time.time, registry=CollectorRegistry()
        )
        self._eventually = eventually
        self._processes: list[subprocess.Popen[bytes]] = []

    def launch(self, **options: object) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("agent_process.py")
        with (self.root / f"{len(self._processes)}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(script), json.dumps({**self.options, **options})],
                stderr=log,
            )
        self._processes.append(process)
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        """What an agent wrote until its end."""
        process.wait(20)
        return (self.root / f"{self._processes.index(process)}.log").read_text()

    def start(self, **options: object) -> tuple[subprocess.Popen[bytes], Json]:
        """Start an agent and wait for its agent.json."""
        (self.root / "state" / "agent.json").unlink(missing_ok=True)
        process = self.launch(**options)
        self._eventually(lambda: self.announced() or process.poll() is not None)
        found = self.announced()
        assert found is not None, self.log(process)
        return process, found

    def announced(self) -> Json | None:
        file = self.root / "state" / "agent.json"
        if not file.exists():
            return None
        found: Json = json.loads(file.read_text())
        return found

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def home(tmp_path: Path, broker: str, eventually: Eventually) -> Iterator[Home]:
    made = Home(tmp_path, broker, eventually)
    yield made
    made.end()


def ask(api: str, text: str) -> Json:
    body = {"messages": [{"role": "user", "content": text}]}
    response = httpx.post(f"{api}/v1/chat/completions", json=body, timeout=20)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def said(answer: Json) -> str:
    return str(answer["choices"][0]["message"]["content"])


def correct(api: str, answer: Json, correction: str) -> str:
    body = {"completion_id": answer["id"], "correction": correction}
    response = httpx.post(f"{api}/v1/feedback", json=body, timeout=20)
    assert response.status_code == 200, response.text
    return str(response.json()["demonstration_id"])


def test_an_agent_says_where_it_is_serves_and_stops_cleanly(home: Home) -> None:
    process, found = home.start()
    assert found["pid"] == process.pid
    assert found["student"] == home.student
    assert said(ask(found["api"], "lamp on")) == "I do not know"
    health = httpx.get(f"{found['api']}/healthz").json()
    assert (health["release"], health["student"]) == (0, home.student)
    assert health["update"]["state"] == "idle"
    metrics = httpx.get(found["metrics"]).text
    assert f'anabranch_student_info{{digest="{home.student[:12]}",release="0"}} 1.0' in metrics
    assert 'anabranch_requests_total{outcome="ok"} 1.0' in metrics
    assert "anabranch_update_state" in metrics
    assert "anabranch_outbox_demonstrations" in metrics
    process.send_signal(signal.SIGTERM)
    log = home.log(process)
    assert process.returncode == 0
    assert home.announced() is None
    assert f"student {home.student[:12]}, release 0" in log
    assert found["api"] in log
    assert "Z INFO edge.agent: stopped" in log


def test_a_second_agent_on_the_same_state_is_refused(home: Home) -> None:
    process, found = home.start()
    with pytest.raises(InvalidInputError, match=rf"process \({process.pid}\) runs on .*--state"):
        run(config(home.options), open_student=open_student)
    assert said(ask(found["api"], "still there?"))


def test_the_lock_leaves_with_its_holder(tmp_path: Path) -> None:
    with locked(tmp_path), (tmp_path / "lock").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(tmp_path):
        pass


def test_corrections_survive_sigkill(home: Home) -> None:
    process, found = home.start()
    correct(found["api"], ask(found["api"], "play jazz"), '{"name":"play"}')
    process.kill()
    process.wait()
    assert home.announced() is not None  # nobody was there to remove it
    _, again = home.start()
    assert said(ask(again["api"], "play jazz")) == '{"name":"play"}'
    health = httpx.get(f"{again['api']}/healthz").json()
    assert health["memory"]["demonstrations"] == 1
    assert health["outbox"]["waiting"] == 1


def test_a_corrupt_memory_does_not_keep_an_agent_from_serving(home: Home) -> None:
    state = home.root / "state"
    state.mkdir()
    (state / "memory.sqlite").write_bytes(b"\0garbage" * 1000)
    (state / "outbox.sqlite").write_bytes(b"\0garbage" * 1000)
    _, found = home.start()
    assert said(ask(found["api"], "lamp on"))
    assert list(state.glob("memory.sqlite.corrupt-*"))
    assert list(state.glob("outbox.sqlite.corrupt-*"))


def test_a_request_in_flight_is_answered_before_the_agent_stops(home: Home) -> None:
    slow = home.root / "slow"
    make_bundle(slow, " ".join(["word"] * 90))  # about a fifth of a second
    process, found = home.start(student=str(slow))
    body = {"messages": [{"role": "user", "content": "go on"}], "stream": True}
    url = f"{found['api']}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=20) as response:
        events = (line for line in response.iter_lines() if line)
        next(events)  # decoding has begun
        process.send_signal(signal.SIGINT)
        rest = list(events)
    assert len(rest) == 90 + 2  # the words, the reason to finish, the end
    assert rest[-1] == "data: [DONE]"
    process.wait(20)
    assert process.returncode == 0


@pytest.mark.parametrize("option", ["listen", "metrics"])
def test_an_address_that_is_taken_is_named(home: Home, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidInputError, match=f"cannot listen on {address}"):
            run(config({**home.options, option: address}), open_student=open_student)
    assert home.announced() is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "a/b"),
        ("channel", ""),
        ("broker", "nowhere"),
        ("cloud", "host:99999"),
        ("listen", ":0"),
        ("metrics", "0"),
        ("threads", 0),
        ("expected_corrections", 1.0),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_touched(
    tmp_path: Path, option: str, value: object
) -> None:
    good: Json = {
        "state": tmp_path / "state",
        "device": "kitchen-1",
        "channel": "home",
        "student": None,
        "trust": tmp_path / "root.json",
        "broker": "127.0.0.1:1883",
        "cloud": "127.0.0.1:8443",
    }
    AgentConfig(**good)
    with pytest.raises(InvalidInputError):
        AgentConfig(**{**good, option: value})
    assert not list(tmp_path.iterdir())


def test_port_zero_is_an_address_to_listen_on() -> None:
    assert listen_address("[::1]:0") == ("::1", 0)


class Fleet(fleet_pb2_grpc.FleetServicer):
    """A cloud with one release, made of full files."""

    def __init__(self, repository: Repository) -> None:
        self.blobs: dict[str, bytes] = {}
        self.reports: list[fleet_pb2.UpdateReport] = []
        self._repository = repository
        self._version = 0
        self._news = threading.Condition()

    def publish(self, bundle: Path, *, version: int, learned_from: list[str]) -> None:
        files = list_files(bundle)
        self.blobs = {f.sha256: (bundle / f.name).read_bytes() for f in files}
        canary = release_pb2.Canary(
            messages=[device_pb2.ChatMessage(role="user", content="who are you?")],
            answer=(bundle / "weights.bin").read_text(),
        )
        manifest = release_pb2.Manifest(
            channel="home",
            version=version,
            student=digest_of(files),
            files=[release_pb2.File(name=f.name, sha256=f.sha256, size=f.size) for f in files],
            canaries=[canary],
            bounds=release_pb2.ProbeBounds(min_equal_share=1.0, max_seconds=20),
            learned_from=learned_from,
        )
        data = manifest.SerializeToString()
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
        self.blobs[blob.sha256] = data
        self._repository.update({f"home/{version}": blob}, self.blobs.__getitem__)
        with self._news:
            self._version = version
            self._news.notify_all()

    def Watch(  # noqa: N802 - gRPC's name
        self, request: fleet_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[fleet_pb2.Target]:
        del request
        told = -1
        while context.is_active():
            with self._news:
                self._news.wait_for(lambda: self._version != told, timeout=0.1)  # noqa: B023 - called at once
                version = self._version
            if version != told:
                told = version
                yield fleet_pb2.Target(release=version)

    def Read(  # noqa: N802 - gRPC's name
        self, request: fleet_pb2.ReadRequest, context: grpc.ServicerContext
    ) -> Iterator[fleet_pb2.Chunk]:
        data = self.blobs.get(request.sha256) or self._repository.read(request.metadata)
        if data is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        yield fleet_pb2.Chunk(offset=request.offset, data=data[request.offset :], size=len(data))

    def Report(  # noqa: N802 - gRPC's name
        self, request: fleet_pb2.UpdateReport, context: grpc.ServicerContext
    ) -> fleet_pb2.ReportReply:
        del context
        self.reports.append(request)
        return fleet_pb2.ReportReply(accepted=True)

    def committed(self) -> bool:
        return any(r.state == fleet_pb2.UPDATE_STATE_COMMITTED for r in list(self.reports))


def test_a_release_is_swapped_in_under_load_and_no_request_fails(
    home: Home, eventually: Eventually
) -> None:
    new = home.root / "new"
    digest = make_bundle(new, FIRST)
    fleet = Fleet(home.repository)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    fleet_pb2_grpc.add_FleetServicer_to_server(fleet, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    process, found = home.start(cloud=f"127.0.0.1:{port}")
    api, done = found["api"], threading.Event()
    learned = correct(api, ask(api, "play jazz"), "jazz")
    correct(api, ask(api, "stop it"), "stop")
    fingerprints: list[list[str]] = [[] for _ in range(4)]
    failures: list[BaseException] = []

    def go_on(seen: list[str]) -> None:
        try:
            while not done.is_set():
                seen.append(ask(api, "play jazz")["system_fingerprint"])
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    people = [threading.Thread(target=go_on, args=(seen,)) for seen in fingerprints]
    for person in people:
        person.start()
    eventually(lambda: all(fingerprints))
    fleet.publish(new, version=7, learned_from=[learned])
    eventually(fleet.committed)
    eventually(lambda: failures or all(digest in seen for seen in fingerprints))
    done.set()
    for person in people:
        person.join(20)
    server.stop(0)
    assert not failures
    for seen in fingerprints:
        assert seen == sorted(seen, key=[home.student, digest].index)  # never back to the old one
    assert said(ask(api, "who are you?")) == FIRST
    health = httpx.get(f"{api}/healthz").json()
    assert (health["release"], health["student"]) == (7, digest)
    assert health["memory"]["demonstrations"] == 1  # the one that was not learned
    assert 'release="7"' in httpx.get(found["metrics"]).text
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert process.returncode == 0
    _, again = home.start()
    assert said(ask(again["api"], "who are you?")) == FIRST
