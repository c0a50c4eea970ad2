"""The cloud and the agent around an update client, in memory, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry

from edge import delta
from edge.student.bundle import FILES, digest, list_files, read_harness
from edge.update.client import UpdateClient
from edge.update.slots import Entry, Slots
from edge.update.transport import Piece
from edge.update.trust import TufReleases
from edge.update.work import Device
from protos.errors import IntegrityError, InvalidInputError, UnavailableError
from protos.harness import Harness
from protos.v1 import device_pb2, fleet_pb2, release_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edge.student.runtime import Decoding
    from protos.prompt import Message
    from tests.update.update_repository import TufRepository
else:
    from update_repository import TufRepository

CHANNEL, DEVICE = "home", "kitchen-1"
NOW = 1_800_000_000.0
WEIGHTS = 6000
PROMPT = "lamp on"


@dataclass(frozen=True)
class Reply:
    """What a probe reads of an answer."""

    text: str


class TinyStudent:
    """Answers with a digest of its weights and of the question."""

    def __init__(self, folder: Path, on_close: Callable[[], object] = lambda: None) -> None:
        self._on_close = on_close
        weights = (folder / "weights.bin").read_bytes()
        if len(weights) != WEIGHTS:
            msg = f"the student in {folder} cannot be opened: weights.bin is broken"
            raise IntegrityError(msg)
        self.digest = digest(folder)
        self.harness = read_harness(folder)
        self.closed = False
        self._seed = hashlib.sha256(weights).digest()

    def answer(self, messages: Sequence[Message], decoding: Decoding) -> Reply:
        assert not self.closed
        assert decoding.max_tokens == self.harness.max_tokens
        text = "".join(m.content for m in messages)
        return Reply(hashlib.sha256(self._seed + text.encode()).hexdigest()[:12])

    def close(self) -> None:
        self._on_close()
        self.closed = True


def make_bundle(folder: Path, seed: int) -> str:
    """A bundle of a few KB; seeds differ as releases do: weights by small steps, and a harness."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(0).integers(0, 256, WEIGHTS, dtype=np.uint8)
    rng = np.random.default_rng(seed)
    weights += rng.choice(np.array([0, 1, 255], np.uint8), WEIGHTS, p=[0.9, 0.05, 0.05])
    (folder / "graph.onnx").write_bytes(b"graph" * 100)
    (folder / "weights.bin").write_bytes(weights.tobytes())
    (folder / "tokenizer.json").write_text(json.dumps({"model": "x" * 900}))
    (folder / "student.json").write_text(json.dumps({"context_length": 64}))
    (folder / "harness.json").write_bytes(Harness(system=f"release {seed}").to_json())
    return digest(folder)


def ask(folder: Path) -> str:
    """The canary's answer of the student in a folder."""
    from protos.prompt import Message, chat

    student = TinyStudent(folder)
    prompt = chat(student.harness.system, [Message("user", PROMPT)])
    return student.answer(prompt, _greedy(student)).text


def _greedy(student: TinyStudent) -> Decoding:
    from edge.student.runtime import Decoding

    return Decoding(max_tokens=student.harness.max_tokens)


@dataclass
class Cloud:
    """A transport whose other side is this object.

    ``faults`` holds what the next reads do instead of answering whole: a number of bytes after
    which the line is cut, or a function from the right pieces to other ones.
    """

    target: int = 0
    repository: TufRepository = field(default_factory=lambda: TufRepository(NOW))
    blobs: dict[str, bytes] = field(default_factory=dict)
    reports: list[fleet_pb2.UpdateReport] = field(default_factory=list)
    faults: deque[int | Callable[[list[Piece]], list[Piece]]] = field(default_factory=deque)
    reads: list[tuple[str, int]] = field(default_factory=list)
    on_read: Callable[[], object] = lambda: None
    on_metadata: Callable[[], object] = lambda: None
    skew: float = 0.0  # seconds that the device's clock is fast
    online: bool = True
    piece: int = 400

    def __post_init__(self) -> None:
        self.trusted_root = self.repository.trusted_root  # devices shipped with it

    def publish(
        self,
        version: int,
        bundle: Path,
        *,
        bases: Sequence[Path] = (),
        change: Callable[[release_pb2.Manifest], None] = lambda _: None,
    ) -> release_pb2.Manifest:
        """Make and sign a release of a bundle, with deltas from other bundles."""
        files = list_files(bundle)
        for name, file in zip(FILES, files, strict=True):
            self.blobs[file.sha256] = (bundle / name).read_bytes()
        canary = release_pb2.Canary(
            messages=[device_pb2.ChatMessage(role="user", content=PROMPT)], answer=ask(bundle)
        )
        manifest = release_pb2.Manifest(
            channel=CHANNEL,
            version=version,
            student=digest(bundle),
            files=[release_pb2.File(name=f.name, sha256=f.sha256, size=f.size) for f in files],
            canaries=[canary],
            bounds=release_pb2.ProbeBounds(min_equal_share=1.0),
            learned_from=[f"demonstration-{version}"],
        )
        for base in bases:
            made = bundle.parent / "made.delta"
            info = delta.encode(base / "weights.bin", bundle / "weights.bin", made)
            self.blobs[info.sha256] = made.read_bytes()
            manifest.deltas.add(
                base_sha256=info.base_sha256,
                target_sha256=info.target_sha256,
                sha256=info.sha256,
                size=info.size,
            )
        change(manifest)
        self.sign(version, manifest)
        self.target = version
        return manifest

    def sign(self, version: int, manifest: release_pb2.Manifest) -> None:
        """Have the signed metadata list a manifest as the one of a release."""
        self.repository.add(f"{CHANNEL}/{version}", manifest.SerializeToString())
        self.repository.publish()

    def watch(self, *, student: str, release: int) -> Iterator[int]:
        del student, release
        self._reach()
        yield self.target

    def read_metadata(self, name: str) -> Iterator[Piece]:
        self._reach()
        self.on_metadata()
        data = self.repository.files.get(name)
        if data is None:
            msg = f"no metadata {name}"
            raise InvalidInputError(msg)
        yield Piece(0, data, len(data))

    def read(self, sha256: str, offset: int) -> Iterator[Piece]:
        self._reach()
        if sha256 in self.repository.blobs:
            manifest = self.repository.blobs[sha256]
            yield Piece(0, manifest, len(manifest))
            return
        self.reads.append((sha256, offset))
        if sha256 not in self.blobs:
            msg = f"no file {sha256}"
            raise InvalidInputError(msg)
        data, size = self.blobs[sha256], len(self.blobs[sha256])
        pieces = [
            Piece(at, data[at : at + self.piece], size) for at in range(offset, size, self.piece)
        ]
        fault = self.faults.popleft() if self.faults else None
        if callable(fault):
            pieces = fault(pieces)
        left = fault if isinstance(fault, int) else 1 << 40
        for piece in pieces:
            self.on_read()
            yield Piece(piece.offset, piece.data[:left], piece.size)
            left -= len(piece.data)
            if left <= 0:
                msg = "the line was cut"
                raise UnavailableError(msg)

    def report(self, report: fleet_pb2.UpdateReport) -> None:
        self._reach()
        self.reports.append(report)

    def close(self) -> None:
        self.online = False

    def _reach(self) -> None:
        if not self.online:
            msg = "the cloud is down"
            raise UnavailableError(msg)

    @property
    def told(self) -> list[str]:
        """States that were reported, in words."""
        return [fleet_pb2.UpdateState.Name(r.state)[13:].lower() for r in self.reports]


class Agent:
    """A device: opens what serves at each start, and holds the students that are open."""

    def __init__(
        self,
        state: Path,
        bundle: Path,
        cloud: Cloud,
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.cloud = cloud
        self.opened: list[TinyStudent] = []
        self.wiped: list[str] = []
        self.hooks: dict[str, Callable[[], object]] = {}
        self.registry = CollectorRegistry()
        self.rss = 1
        self.room = True  # for a second student
        self.most_open = 0
        self.now = 0.0
        self.slots = Slots(state / "slots")
        self.student, serving = self.slots.start(bundle=bundle, open_student=self.open)
        self.client: UpdateClient[TinyStudent] = UpdateClient(
            state=state,
            slots=self.slots,
            serving=serving,
            device=Device(
                open_student=self.open,
                swap=self.swap,
                reopen=lambda: self.slots.start(bundle=bundle, open_student=self.open),
                on_commit=self.on_commit,
                has_room=lambda _: self.room,
                unload=self.unload,
                rss_bytes=lambda: self.rss,
                monotonic=self.monotonic,
            ),
            transport=cloud,
            trusted=TufReleases(
                root=cloud.trusted_root,
                folder=state / "trust",
                channel=CHANNEL,
                transport=cloud,
                clock=lambda: NOW + cloud.skew,
            ),
            clock=lambda: NOW,
            random=random.Random(0),
            registry=self.registry,
            progress=progress,
            backoff_base_s=0.0,
        )

    def hook(self, name: str) -> None:
        """Where a test can raise, look, or kill the process."""
        self.hooks.get(name, lambda: None)()

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    def open(self, folder: Path) -> TinyStudent:
        self.hook("open")
        self.opened.append(TinyStudent(folder, lambda: self.hook("close")))
        self.most_open = max(self.most_open, sum(not s.closed for s in self.opened))
        return self.opened[-1]

    def swap(self, student: TinyStudent) -> None:
        self.hook("swap")
        old, self.student = self.student, student
        old.close()

    def unload(self) -> None:
        self.hook("unload")
        self.student.close()

    def on_commit(self, manifest: release_pb2.Manifest) -> None:
        self.hook("wipe")
        self.wiped.extend(manifest.learned_from)

    def update(self) -> None:
        """Hear the cloud's target and do what follows from it."""
        if self.cloud.online:
            self.client.announce(self.cloud.target)
        self.client.settle()

    def check(self) -> Entry:
        """Whatever happened: exactly one open student, verified on the disk, and nothing left."""
        assert [s.digest for s in self.opened if not s.closed] == [self.student.digest]
        pointer = self.slots.pointer()
        assert pointer.current is not None
        assert pointer.current == self.client.status.serving
        assert pointer.current.student == self.student.digest
        self.slots.check(self.student.digest)
        pointed = {e.student for e in (pointer.current, pointer.previous) if e}
        folder = self.slots.folder("pointer.json").parent
        assert {p.name for p in folder.iterdir() if p.is_dir()} == pointed
        return pointer.current

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


class World:
    """A device with a provisioned student, a cloud, and bundles of three releases."""

    def __init__(self, root: Path) -> None:
        self.state = root / "state"
        self.bundles = [root / f"bundle-{n}" for n in range(4)]
        self.digests = [make_bundle(b, n) for n, b in enumerate(self.bundles)]
        self.cloud = Cloud()

    def publish(
        self, n: int, *, change: Callable[[release_pb2.Manifest], None] = lambda _: None
    ) -> release_pb2.Manifest:
        """Release ``n`` with the bundle ``n`` and a delta from the one before."""
        return self.cloud.publish(n, self.bundles[n], bases=[self.bundles[n - 1]], change=change)

    def agent(self) -> Agent:
        """The device's process, started."""
        return Agent(self.state, self.bundles[0], self.cloud)


def raising(error: BaseException) -> Callable[[], None]:
    """A hook that fails."""

    def fail() -> None:
        raise error

    return fail
