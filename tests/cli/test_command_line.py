"""The command as people type it: help that names everything, errors that say what to do."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from cloud.cli import main
from cloud.db import open_database
from cloud.releases.repository import Repository
from cloud.releases.store import ReleaseStore
from edge.process import locked
from edge.student.bundle import FILES
from protos.harness import Harness
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)
COMMANDS = {
    "broker": ["--listen", "--state", "--insecure"],
    "student import": ["--out", "--harness"],
    "student teach": [
        *("--student", "--out", "--learner", "--steps", "--learning-rate", "--budget", "--set"),
        *("--precision", "--min-new", "--max-base-kl", "--delta-share", "--threads"),
    ],
    "student ask": ["--threads"],
    "cloud": [
        *("--state", "--student", "--channel", "--broker", "--grpc", "--metrics"),
        *(
            "--demonstrations",
            "--learner",
            "--steps",
            "--learning-rate",
            "--budget",
            "--set",
            "--precision",
            "--delta-share",
            "--min-new",
            "--max-base-kl",
            "--plan",
            "--timestamp-hours",
            "--targets-days",
            "--threads",
        ),
        *("--tls-name", "--enrolment", "--broker-folder", "--certificate-days", "--insecure"),
        *("--quota-burst", "--quota-rate", "--quota-mb"),
    ],
    "edge": [
        *("--state", "--device", "--trust", "--student", "--channel", "--broker", "--cloud"),
        *("--listen", "--metrics", "--expected-corrections", "--threads", "--memory-limit"),
        *("--identity", "--insecure"),
    ],
    "device add": ["--state", "--channel", "--hours"],
    "device token": ["--state", "--hours"],
    "device list": ["--state"],
    "device revoke": ["--state", "--reason"],
    "device enroll": ["--identity", "--cloud", "--ca", "--token", "--device", "--again"],
    "keys new": [],
    "keys list": ["--state"],
    "keys change": ["--state", "--role", "--add", "--remove", "--threshold", "--days"],
    "release list": ["--state"],
    "release sign": ["--key"],
    "demo": ["--out", "--seed", "--threads"],
    "rollout list": ["--state", "--json"],
    "rollout show": ["--state", "--channel", "--json"],
    "rollout start": ["--state", "--channel", "--release", "--plan", "--reason"],
    "rollout pause": ["--state", "--channel"],
    "rollout resume": ["--state", "--channel"],
    "rollout abort": ["--state", "--channel", "--reason"],
    "rollout rollback": ["--state", "--channel", "--to", "--plan", "--reason"],
    "device pin": ["--state", "--channel", "--release"],
    "device unpin": ["--state", "--channel"],
    "device unbox": ["--state", "--channel"],
}


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


Anabranch = Callable[..., Ended]


@pytest.fixture
def anabranch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Anabranch:
    """Run the command to its end, in an empty folder, on a wide terminal without colours."""
    for name, value in (("COLUMNS", "200"), ("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["anabranch", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return command


def complaint(ended: Ended) -> str:
    """The one line that tells a person what to do."""
    assert ended.code == 1
    assert ended.err.startswith("anabranch: ")
    assert len(ended.err.splitlines()) == 1
    return ended.err


def test_help_names_every_command(anabranch: Anabranch) -> None:
    ended = anabranch("--help")
    assert ended.code == 0
    for name in ("broker", "student", "cloud", "edge", "keys", "release", "device", "rollout"):
        assert re.search(rf"\b{name}\b", ended.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_options(anabranch: Anabranch, command: str) -> None:
    ended = anabranch(*command.split(), "--help")
    assert ended.code == 0
    said = set(re.findall(r"--[a-z-]+", ended.out))
    assert said == {*COMMANDS[command], "--help"}


DEVICE = ("edge", "--state", "state", "--device", "kitchen", "--trust", "root.json")
CLOUD = ("cloud", "--state", "state", "--student", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (CLOUD, "nowhere holds no imported student: run `anabranch student import --out nowhere`"),
        ((*CLOUD, "--broker", "nowhere"), "'nowhere' is not an address: write host:port"),
        ((*CLOUD, "--grpc", "50051"), "'50051' is not an address"),
        ((*CLOUD, "--metrics", "host:port"), "'host:port' is not an address"),
        ((*CLOUD, "--channel", "a/b"), "channel 'a/b'"),
        ((*CLOUD, "--learner", "sfd"), "no learner is named 'sfd': choose from sdft"),
        ((*CLOUD, "--set", "ranks=8"), "a learner has no option 'ranks': choose from alpha"),
        ((*CLOUD, "--set", "rank=many"), "rank=many: a value of another kind is wanted"),
        ((*CLOUD, "--set", "rank=-1"), "rank is -1: it is not negative"),
        (DEVICE, "root.json is not there: copy the cloud's tuf/root.json to it"),
        ((*DEVICE, "--broker", "1883"), "'1883' is not an address"),
        ((*DEVICE, "--cloud", "host:99999"), "'host:99999' is not an address"),
        ((*DEVICE, "--device", "+"), "device '+'"),
        (("broker", "--listen", "nowhere"), "'nowhere' is not an address"),
        (("broker", "--listen", "0.0.0.0:1883"), "would be without TLS"),
        ((*CLOUD, "--grpc", "0.0.0.0:50051"), "the fleet service at 0.0.0.0 would be without TLS"),
        ((*CLOUD, "--broker", "broker.lan:1883"), "Give --tls-name; or --insecure"),
        ((*CLOUD, "--tls-name", "ü"), "'ü' is neither a host's name nor an address"),
        ((*CLOUD, "--tls-name", "a", "--enrolment", "here"), "'here' is not an address"),
        ((*DEVICE, "--cloud", "cloud.lan:50051"), "the cloud at cloud.lan would be without TLS"),
        ((*DEVICE, "--identity", "nowhere"), "enrol this device with `anabranch device enroll`"),
        ((*DEVICE[:3], *DEVICE[5:]), "Give --device, or --identity"),
        (("device", "add", "lamp", "--state", "nowhere"), "nowhere is no folder"),
        (("student", "import", "nowhere", "--out", "student"), "neither a GGUF file nor"),
        (("student", "ask", "nowhere", "lamp on"), "nowhere is no student's bundle, graph.onnx"),
    ],
)
def test_what_a_person_can_mend_is_said_in_one_line(
    anabranch: Anabranch, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    ended = anabranch(*arguments)
    assert said in complaint(ended)
    assert {p.name for p in tmp_path.iterdir()} <= {"state"}


def test_a_device_without_a_student_says_how_to_get_one(
    anabranch: Anabranch, tmp_path: Path
) -> None:
    Repository(state=tmp_path / "cloud", clock=time.time, registry=CollectorRegistry())
    arguments = ("edge", "--state", str(tmp_path / "state"), "--device", "kitchen")
    ended = anabranch(*arguments, "--trust", str(tmp_path / "cloud" / "tuf" / "root.json"))
    assert "--student" in complaint(ended)


@pytest.mark.parametrize(
    "arguments",
    [
        ("student", "import", "--out", "student", "--harness", "nowhere.json"),
        ("cloud", "--state", "state"),
        ("edge", "--threads", "0"),
        ("cloud", "--min-new", "2"),
        ("nonsense",),
    ],
)
def test_an_option_that_is_wrong_in_itself_is_a_usage_error(
    anabranch: Anabranch, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    ended = anabranch(*arguments)
    assert ended.code == 2
    assert "Usage: " in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--grpc", "--metrics"])
def test_a_cloud_whose_address_is_taken_ends_in_good_order(
    anabranch: Anabranch, tmp_path: Path, tiny_student: Path, option: str
) -> None:
    state = tmp_path / "state"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = {"--grpc": "127.0.0.1:0", "--metrics": "127.0.0.1:0", option: address}
        arguments = [word for pair in options.items() for word in pair]
        ended = anabranch(
            "cloud", "--state", str(state), "--student", str(tiny_student), *arguments
        )
    assert f"cannot listen on {address}" in complaint(ended)
    assert not (state / "cloud.json").exists()


def test_a_second_cloud_on_the_same_state_is_refused(
    anabranch: Anabranch, tmp_path: Path, tiny_student: Path
) -> None:
    with locked(tmp_path):
        ended = anabranch("cloud", "--state", str(tmp_path), "--student", str(tiny_student))
    assert f"process ({os.getpid()}) runs on {tmp_path}" in complaint(ended)


def test_as_a_process_of_its_own_it_ends_with_the_same_line_and_code() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "cloud.cli", "broker", "--listen", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "'nowhere' is not an address" in complaint(Ended(ended.returncode, "", ended.stderr))


def test_keys_go_offline_and_a_release_is_signed_by_hand(
    anabranch: Anabranch, tmp_path: Path
) -> None:
    """The whole ceremony as an operator types it."""
    state, registry = tmp_path / "state", CollectorRegistry()
    state.mkdir()
    engine = open_database(state / "cloud.sqlite")
    store = ReleaseStore(folder=state, engine=engine, clock=time.time, registry=registry)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in FILES:
        (bundle / name).write_bytes(Harness().to_json())
    store.publish(bundle, channel="home", canaries=[], bounds=release_pb2.ProbeBounds())
    made = anabranch("keys", "new", "anna.pem")
    assert made.code == 0
    key = made.out.split()[1]
    (old,) = re.findall(r"([0-9a-f]{64})  here", anabranch_role(anabranch, state, "targets"))
    change = ("keys", "change", "--state", str(state), "--role", "targets")
    changed = anabranch(*change, "--add", "anna.pub", "--remove", old[:8])
    assert f"new key {key[:12]}" in changed.out
    assert f"key {old[:12]} signs no more" in changed.out
    assert "1 signatures wanted" in changed.out
    store.sync()
    folder = str(state / "tuf" / "to-sign")
    assert "targets" in anabranch("release", "sign", folder).out
    assert "signed targets" in anabranch("release", "sign", folder, "--key", "anna.pem").out
    store.sync()
    assert f"{key}  elsewhere" in anabranch_role(anabranch, state, "targets")
    (bundle / "weights.bin").write_bytes(b"other")
    release = store.publish(bundle, channel="home", canaries=[], bounds=release_pb2.ProbeBounds())
    listed = anabranch("release", "list", "--state", str(state)).out.splitlines()
    assert "waits to be signed" in listed[0]
    assert listed[1].endswith("released")
    looked = anabranch("release", "sign", folder).out
    assert f"release home/2: student {release.student[:12]}" in looked
    assert "1 signatures wanted" in looked
    assert "0 more wanted" in anabranch("release", "sign", folder, "--key", "anna.pem").out
    store.sync()
    listed = anabranch("release", "list", "--state", str(state)).out.splitlines()
    assert listed[0].endswith("released")
    engine.dispose()


def anabranch_role(anabranch: Anabranch, state: Path, role: str) -> str:
    """What `keys list` says of a role."""
    said = anabranch("keys", "list", "--state", str(state)).out
    return said[said.index(f"{role} ") :].partition("UTC")[2].partition(" UTC")[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("keys", "new", "key"), "does not end in .pem"),
        (("keys", "list", "--state", "."), "has no TUF repository yet"),
        (("keys", "change", "--state", ".", "--role", "root"), "has no TUF repository yet"),
        (("release", "list", "--state", "."), "has no TUF repository yet"),
        (("release", "sign", "."), "holds nothing to sign"),
    ],
)
def test_wrong_use_of_keys_says_what_to_do(
    anabranch: Anabranch, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert said in complaint(anabranch(*arguments))
    assert not (tmp_path / "tuf").exists()
