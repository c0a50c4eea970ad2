"""Publishing and finding releases."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from cloud.db import open_database, read
from cloud.releases.store import Release, ReleaseStore
from cloud.releases.tables import ReleaseRow
from edge import delta as deltas
from edge.student import bundle as bundles
from edge.update.manifest import parse
from protos.errors import IntegrityError, InvalidInputError, StorageError
from protos.v1 import device_pb2, release_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Engine

    from tests.releases.release_bundles import write_bundle
else:
    from release_bundles import write_bundle

CANARY = release_pb2.Canary(
    messages=[device_pb2.ChatMessage(role="user", content="lamp on")], answer='{"name": "on"}'
)
NOW = 1_700_000_000.5
BOUNDS = release_pb2.ProbeBounds(min_equal_share=0.9, max_seconds=10.0)


def clock() -> float:
    return NOW


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """See :func:`write_bundle`."""
    return lambda name, **more: write_bundle(tmp_path / "bundles" / name, **more)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """The database in the cloud's state folder."""
    (tmp_path / "state").mkdir()
    return open_database(tmp_path / "state" / "cloud.db")


@pytest.fixture
def open_store(tmp_path: Path, engine: Engine) -> Callable[..., ReleaseStore]:
    """Open the store of the state folder, as a new process would."""

    def open_(*, registry: CollectorRegistry | None = None) -> ReleaseStore:
        registry = registry or CollectorRegistry()
        return ReleaseStore(
            folder=tmp_path / "state",
            engine=engine,
            clock=clock,
            registry=registry,
        )

    return open_


def publish(store: ReleaseStore, bundle: Path, channel: str = "home", **more: object) -> Release:
    return store.publish(bundle, channel=channel, canaries=[CANARY], bounds=BOUNDS, **more)  # type: ignore[arg-type] # passed through


def test_a_release_is_what_a_device_needs_and_believes(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    store, bundle = open_store(), make_bundle("base")
    check = release_pb2.GateCheck(name="new", value=0.8, bound=0.6, passed=True)
    release = publish(store, bundle, learned_from=["d1", "d2"], gate=[check])
    assert release.signed
    listed = json.loads(next((tmp_path / "state/tuf/metadata").glob("*.targets.json")).read_text())
    sha256 = listed["signed"]["targets"]["home/1"]["hashes"]["sha256"]
    assert store.blob_kind("home", sha256) == "manifest"
    manifest = parse(store.blobs.read_all(sha256), channel="home", release=1)
    assert (manifest.version, manifest.student) == (1, bundles.digest(bundle))
    assert list(manifest.canaries) == [CANARY]
    assert (manifest.bounds, list(manifest.gate)) == (BOUNDS, [check])
    assert list(manifest.learned_from) == ["d1", "d2"]
    assert manifest.created_ms == 1_700_000_000_500
    for file in manifest.files:
        assert store.blob_kind("home", file.sha256) == "file"
        assert store.blobs.read(file.sha256, 0, file.size)[0] == (bundle / file.name).read_bytes()
    assert open_store().latest("home") == release


def test_deltas_lead_from_the_last_two_releases_to_the_new_one(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    store = open_store()
    for version in range(1, 4):
        release = publish(store, make_bundle(f"v{version}", changed=1000 * version))
    target = tmp_path / "bundles" / "v3" / "weights.bin"
    assert [d.base_sha256 for d in release.manifest.deltas] == [
        bundles.sha256_file(tmp_path / "bundles" / name / "weights.bin") for name in ("v2", "v1")
    ]
    for delta, base in zip(release.manifest.deltas, ("v2", "v1"), strict=True):
        assert store.blob_kind("home", delta.sha256) == "delta"
        out = tmp_path / "applied.bin"
        base_path = tmp_path / "bundles" / base / "weights.bin"
        deltas.apply(base_path, store.blobs.path(delta.sha256), out)
        assert out.read_bytes() == target.read_bytes()
    assert release.delta_bytes == release.manifest.deltas[0].size < release.full_bytes / 20


def test_products_make_the_delta_from_the_newest_release_small(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """They are no part of the release: a device further behind needs none of them."""
    rows, columns, block = 512, 256, 64
    size = rows * columns
    names = ("codes", "uint8", [rows, columns], 0), ("codes.scales", "float32", [rows, 4], size)
    keys = ("name", "dtype", "shape", "offset")
    layout = json.dumps({"tensors": [dict(zip(keys, n, strict=True)) for n in names]})
    tensor = deltas.Tensor(0, rows, columns, size, block)
    rng = np.random.default_rng(0)
    left, right = (rng.integers(-99, 99, (n, 4)).astype(np.int8) for n in (rows, columns))
    update = deltas.Update(tensor, 0, deltas.Factors.of(left, right, np.full(4, 1e-7), 0.001))
    scales = np.full((rows, columns // block), 0.001, np.float32)
    codes = rng.integers(1, 256, (rows, columns)).astype(np.uint8)
    store = open_store()
    for version, updates in enumerate(([], [], [update])):
        bundle = make_bundle(f"v{version}")
        if updates:
            deltas.Product(update.factors, block).add(codes, scales.view(np.uint32), 0)
        codes[0, version] ^= 1
        (bundle / "student.json").write_text(layout)
        (bundle / "weights.bin").write_bytes(codes.tobytes() + scales.tobytes())
        release = publish(store, bundle, updates=updates)
    newest, older = release.manifest.deltas
    assert newest.size < older.size / 5
    for delta, base in ((newest, "v1"), (older, "v0")):
        base_path, out = tmp_path / "bundles" / base / "weights.bin", tmp_path / "out"
        deltas.apply(base_path, store.blobs.path(delta.sha256), out)
        assert out.read_bytes() == (bundle / "weights.bin").read_bytes()


def test_an_older_base_is_served_when_asked_for(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store = open_store()
    first = publish(store, make_bundle("v1"))
    for version in (2, 3):
        publish(store, make_bundle(f"v{version}", changed=1000 * version))
    release = publish(store, make_bundle("v4", changed=9000), bases=[1, 3])
    weights = next(f.sha256 for f in first.manifest.files if f.name == "weights.bin")
    assert len(release.manifest.deltas) == 3
    assert release.manifest.deltas[2].base_sha256 == weights
    with pytest.raises(InvalidInputError, match="no release 99"):
        publish(store, make_bundle("v5"), bases=[99])


def test_a_delta_that_saves_nothing_is_dropped(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store = open_store()
    publish(store, make_bundle("v1", seed=1))
    release = publish(store, make_bundle("v2", seed=2))
    assert not release.manifest.deltas
    weights = next(f for f in release.manifest.files if f.name == "weights.bin")
    assert release.delta_bytes == weights.size


def test_a_release_of_the_harness_alone_costs_its_bytes(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store, registry = open_store(), CollectorRegistry()
    publish(store, make_bundle("v1"))
    release = publish(store, make_bundle("v2", system="Answer in JSON."))
    harness = next(f for f in release.manifest.files if f.name == "harness.json")
    assert not release.manifest.deltas
    assert release.delta_bytes == harness.size
    open_store(registry=registry)
    labels = {"channel": "home"}
    assert registry.get_sample_value("anabranch_delta_bytes", labels) == harness.size
    assert registry.get_sample_value("anabranch_full_bytes", labels) == release.full_bytes


def test_a_delta_is_built_once_and_again_when_it_was_damaged(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store = open_store()
    bundle = make_bundle("v2", changed=500)
    publish(store, make_bundle("v1"))
    first = publish(store, bundle).manifest.deltas[0]
    path = store.blobs.path(first.sha256)
    built = path.stat().st_mtime_ns
    assert publish(store, bundle).manifest.deltas[0] == first
    assert path.stat().st_mtime_ns == built
    path.write_bytes(b"damaged")
    assert publish(store, bundle, bases=[1]).manifest.deltas[0] == first
    assert bundles.sha256_file(path) == first.sha256


def die(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_publish_that_dies_before_it_is_signed_is_signed_at_the_next_start(
    open_store: Callable[..., ReleaseStore],
    make_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = open_store()
    monkeypatch.setattr(store._repository, "update", die)
    with pytest.raises(KeyboardInterrupt):
        publish(store, make_bundle("base"))
    left = store.latest("home")
    assert left is not None
    assert not left.signed
    found = open_store().latest("home")
    assert found == dataclasses.replace(left, signed=True)


def test_a_publish_that_dies_before_its_row_leaves_nothing_visible_and_is_begun_again(
    open_store: Callable[..., ReleaseStore],
    make_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, bundle = open_store(), make_bundle("base")
    monkeypatch.setattr(store._rows, "add", die)
    with pytest.raises(KeyboardInterrupt):
        publish(store, bundle)
    store = open_store()
    weights = bundles.sha256_file(bundle / "weights.bin")
    assert store.latest("home") is None
    assert store.channels() == []
    assert store.blob_kind("home", weights) is None
    assert publish(store, bundle).version == 1


def test_a_publish_that_cannot_commit_leaves_nothing_visible(
    open_store: Callable[..., ReleaseStore],
    make_bundle: Callable[..., Path],
    engine: Engine,
) -> None:
    store = open_store()
    publish(store, make_bundle("v1"))
    with engine.begin() as connection:
        # What a full disk does, once the pages that are there are full.
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
    published = 1

    def publish_until_it_is_full() -> None:
        nonlocal published
        while published < 100:
            publish(store, make_bundle(f"more-{published}", changed=100 + published))
            published += 1

    with pytest.raises(StorageError):
        publish_until_it_is_full()
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    latest = store.latest("home")
    assert latest is not None
    assert latest.version == published
    assert publish(store, make_bundle("last", changed=99)).version == published + 1


_KILLED = """
import os, pathlib, signal, sys
from prometheus_client import CollectorRegistry
from cloud.db import open_database
from cloud.releases.store import ReleaseStore
from protos.v1 import release_pb2

registry = CollectorRegistry()
state, bundle = map(pathlib.Path, sys.argv[1:])
store = ReleaseStore(folder=state, engine=open_database(state / "cloud.db"), clock=lambda: 0.0,
                     registry=registry)
store._rows.add = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.publish(bundle, channel="home", canaries=[], bounds=release_pb2.ProbeBounds())
"""


def test_a_publish_survives_sigkill_between_files_and_row(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = make_bundle("base")
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "state"), str(bundle)], check=False
    )
    assert process.returncode == -signal.SIGKILL
    store = open_store()
    assert store.channels() == []
    assert publish(store, bundle).version == 1


def test_what_a_rollback_needs_is_signed_with_the_release(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """The keys may be in a safe on the night when a release is bad."""
    store = open_store()
    old = publish(store, make_bundle("v1"), learned_from=["d1"])
    bad = publish(store, make_bundle("v2", changed=100), fallback=1)
    for role in ("root", "targets"):
        (tmp_path / "state" / "keys" / f"{role}.pem").unlink()
    store = open_store()
    store.withdraw("home", bad.version)
    back = store.republish("home", old.version)
    assert back.signed
    assert (back.version, back.student) == (3, old.student)
    assert list(back.manifest.learned_from) == ["d1"]
    bases = [d.base_sha256 for d in back.manifest.deltas]
    assert bases == [f.sha256 for f in bad.manifest.files if f.name == "weights.bin"]
    assert open_store().latest("home") == back


def test_the_way_back_that_was_not_gone_makes_room_for_the_next_release(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store = open_store()
    publish(store, make_bundle("v1"))
    publish(store, make_bundle("v2", changed=100), fallback=1)
    third = publish(store, make_bundle("v3", changed=200), fallback=2)
    assert (third.version, third.signed) == (3, True)
    latest = open_store().latest("home")
    assert latest == third


def test_rolling_back_is_a_newer_release_with_the_old_content(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store = open_store()
    old = publish(store, make_bundle("v1"), learned_from=["d1"])
    bad = publish(store, make_bundle("v2", changed=100), learned_from=["d1", "d2"])
    store.withdraw("home", bad.version)
    assert store.latest("home") == old
    back = store.republish("home", old.version)
    assert (back.version, back.student) == (3, old.student)
    assert list(back.manifest.learned_from) == ["d1"]
    assert list(back.manifest.canaries) == [CANARY]
    bases = [d.base_sha256 for d in back.manifest.deltas]
    assert bases == [f.sha256 for f in bad.manifest.files if f.name == "weights.bin"]
    withdrawn = store.find("home", bad.version)
    assert withdrawn is not None
    assert withdrawn.withdrawn


def test_a_version_is_above_what_devices_are_known_to_run(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store = open_store()
    assert publish(store, make_bundle("v1"), above=6).version == 7
    assert publish(store, make_bundle("v2", changed=10), above=6).version == 8


def test_channels_have_their_own_versions_and_their_own_files(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store = open_store()
    publish(store, make_bundle("v1"))
    other = publish(store, make_bundle("other", seed=5), channel="office")
    assert other.version == 1
    weights = next(f.sha256 for f in other.manifest.files if f.name == "weights.bin")
    assert store.blob_kind("office", weights) == "file"
    assert store.blob_kind("home", weights) is None
    assert sorted(store.channels()) == ["home", "office"]


def test_a_bundle_folder_is_made_from_the_store_and_again_when_it_was_broken(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store, bundle = open_store(), make_bundle("v1")
    release = publish(store, bundle)
    folder = store.bundle_folder("home", 1)
    assert bundles.digest(folder) == release.student
    (folder / "graph.onnx").unlink()
    assert store.bundle_folder("home", 1) == folder
    assert bundles.digest(folder) == release.student
    with pytest.raises(InvalidInputError, match="newest is 1"):
        store.bundle_folder("home", 2)


@pytest.mark.parametrize("damage", [b"", b"garbage", "truncated", "missing"])
def test_a_damaged_manifest_is_never_given_out(
    open_store: Callable[..., ReleaseStore],
    make_bundle: Callable[..., Path],
    engine: Engine,
    damage: bytes | str,
) -> None:
    store = open_store()
    publish(store, make_bundle("v1"))
    with read(engine) as session:
        file = store.blobs.path(session.get_one(ReleaseRow, ("home", 1)).manifest)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "missing":
        file.unlink()
    elif isinstance(damage, bytes):
        file.write_bytes(damage)
    with pytest.raises(IntegrityError, match="release 1 in channel 'home'"):
        store.find("home", 1)
    # A new release goes on, without deltas from the damaged one.
    assert publish(store, make_bundle("v2", changed=10)).version == 2


def test_a_damaged_base_costs_the_delta_and_not_the_release(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store, base = open_store(), make_bundle("v1")
    publish(store, base)
    weights = np.frombuffer((base / "weights.bin").read_bytes(), np.uint8).copy()
    weights[0] ^= 1
    (base / "weights.bin").write_bytes(weights.tobytes()[:-1])
    release = publish(store, make_bundle("v2", changed=10))
    assert not release.manifest.deltas


@pytest.mark.parametrize("name", ["weights.bin", "harness.json"])
def test_half_a_bundle_is_refused(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path], name: str
) -> None:
    bundle = make_bundle("v1")
    (bundle / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        publish(open_store(), bundle)


def test_malformed_names_and_harnesses_are_refused(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path]
) -> None:
    store, bundle = open_store(), make_bundle("v1")
    with pytest.raises(InvalidInputError, match="channel"):
        publish(store, bundle, channel="a/b")
    (bundle / "harness.json").write_bytes(b"{")
    with pytest.raises(InvalidInputError, match=r"harness\.json"):
        publish(store, bundle)


def test_another_process_on_the_same_state_is_noticed(
    open_store: Callable[..., ReleaseStore],
    make_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others, slow = open_store(), open_store()
    bundle, other_bundle = make_bundle("v1"), make_bundle("v2", changed=10)
    add = slow._rows.add

    def late(row: ReleaseRow, kinds: dict[str, str]) -> None:
        publish(others, other_bundle)
        add(row, kinds)

    monkeypatch.setattr(slow._rows, "add", late)
    with pytest.raises(StorageError, match="one cloud per state folder"):
        publish(slow, bundle)
    latest = open_store().latest("home")
    assert latest is not None
    assert latest.student == bundles.digest(other_bundle)


def test_a_database_that_was_lost_leaves_the_files(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    store, bundle = open_store(), make_bundle("v1")
    before = publish(store, bundle)
    for path in (tmp_path / "state").glob("cloud.db*"):
        path.unlink()
    engine = open_database(tmp_path / "state" / "cloud.db")
    registry = CollectorRegistry()
    again = type(store)(
        folder=tmp_path / "state",
        engine=engine,
        clock=clock,
        registry=registry,
    )
    assert again.latest("home") is None
    assert publish(again, bundle, above=before.version).version == 2


def test_releases_from_before_tuf_are_taken_over_once(
    open_store: Callable[..., ReleaseStore], make_bundle: Callable[..., Path], engine: Engine
) -> None:
    store = open_store()
    old = [publish(store, make_bundle("v1")), publish(store, make_bundle("v2", changed=9))]
    before = [release.manifest.SerializeToString() for release in old]
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM manifests")
        connection.exec_driver_sql("DELETE FROM release_blobs WHERE kind = 'manifest'")
        connection.exec_driver_sql(
            "CREATE TABLE releases (channel, version, student, signed, created_ms, withdrawn, "
            "full_bytes, delta_bytes)"
        )
        for release, data in zip(old, before, strict=True):
            size = len(data)
            assert 128 <= size < 128 * 128  # two bytes of a varint
            varint = bytes([0x80 | size & 0x7F, size >> 7])
            connection.exec_driver_sql(
                "INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *("home", release.version, release.student),
                    *(b"\x0a" + varint + data + b"\x12\x02\x0a\x00", release.created_ms),
                    *(release.version == 1, release.full_bytes, release.delta_bytes),
                ),
            )
        connection.exec_driver_sql(
            "INSERT INTO releases VALUES ('home', 3, '', x'0a7f00', 0, 0, 0, 0)"  # damaged
        )
    for _ in range(2):
        store = open_store()
        assert store.latest("home") == old[1]
        assert [store.release("home", n).manifest.SerializeToString() for n in (1, 2)] == before
        assert store.release("home", 1).withdrawn
        assert store.find("home", 3) is None
    assert publish(store, make_bundle("v3", changed=20)).version == 3
