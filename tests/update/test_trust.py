"""What a device believes: TUF's attacks, one by one, through python-tuf's own fetcher interface.

The attacker of each test controls the network, and in some a key of the cloud's. What it can reach
in the end, and how the device comes back to the truth, is what the tests say.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from tuf.api.metadata import Metadata, Root, TargetFile
from tuf.ngclient import FetcherInterface

from edge.update.manifest import MAX_MANIFEST_BYTES
from edge.update.pace import GRACE_S
from edge.update.transport import Piece
from edge.update.trust import TufReleases, load_root
from protos.errors import (
    ExpiredError,
    IntegrityError,
    InvalidInputError,
    StorageError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from protos.v1 import fleet_pb2
    from tests.update.update_repository import DAY_S, TufRepository, signer
else:
    from update_repository import DAY_S, TufRepository, signer

NOW = 1_800_000_000.0
ENDLESS = 1 << 40


class Network:
    """A transport to a repository. ``answer`` may give other pieces than the right ones."""

    def __init__(self, repository: TufRepository) -> None:
        self.repository = repository
        self.answer: Callable[[str, bytes], Iterator[Piece]] = lambda _, data: iter(
            [Piece(0, data, len(data))]
        )
        self.asked: list[str] = []

    def read_metadata(self, name: str) -> Iterator[Piece]:
        return self._give(name, self.repository.files.get(name))

    def read(self, sha256: str, offset: int) -> Iterator[Piece]:
        assert offset == 0
        return self._give(sha256, self.repository.blobs.get(sha256))

    def _give(self, name: str, data: bytes | None) -> Iterator[Piece]:
        self.asked.append(name)
        if data is None:
            msg = f"no {name}"
            raise InvalidInputError(msg)
        yield from self.answer(name, data)

    def watch(self, *, student: str, release: int) -> Iterator[int]:
        raise NotImplementedError

    def report(self, report: fleet_pb2.UpdateReport) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Device:
    """A device that shipped with the first root of a repository, and its clock."""

    def __init__(self, folder: Path) -> None:
        self.cloud = TufRepository(NOW)
        self.cloud.add("home/1", b"one")
        self.cloud.publish()
        self.network = Network(self.cloud)
        self.folder = folder
        self.now = NOW
        self.monotonic = 0.0

    def believe(self, release: int = 1, kept: bytes = b"") -> bytes:
        """What a process that has just started believes."""
        trusted = TufReleases(
            root=self.cloud.trusted_root,
            folder=self.folder / "trust",
            channel="home",
            transport=self.network,
            clock=lambda: self.now,
            monotonic=lambda: self.monotonic,
        )
        return trusted.manifest(release, kept=kept)

    def renew(self) -> None:
        """The cloud signs anew what it signs online, for the clock's time."""
        self.cloud.snapshot.expires = self.cloud.at(self.now + 7 * DAY_S)
        self.cloud.timestamp.expires = self.cloud.at(self.now + DAY_S)
        self.cloud.publish_snapshot()
        self.cloud.publish_timestamp()

    def publish(self, release: int, data: bytes) -> None:
        self.cloud.add(f"home/{release}", data)
        self.cloud.publish()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_a_listed_manifest_is_believed_and_fetched_once(device: Device) -> None:
    assert device.believe() == b"one"
    (sha256,) = [name for name in device.network.asked if len(name) == 64]
    assert device.believe(kept=b"one") == b"one"
    assert device.network.asked.count(sha256) == 1
    assert device.believe(kept=b"another") == b"one"
    assert device.network.asked.count(sha256) == 2


def test_what_did_not_change_is_not_fetched_again(device: Device) -> None:
    device.believe()
    device.network.asked.clear()
    device.believe(kept=b"one")
    assert device.network.asked == ["2.root.json", "timestamp.json"]


def test_an_arbitrary_manifest_is_not_installed(device: Device) -> None:
    """Arbitrary installation: the network gives other bytes than the signed list says."""
    device.network.answer = lambda name, data: iter(
        [Piece(0, b"bad" if len(name) == 64 else data, 3)]
    )
    with pytest.raises(IntegrityError, match="LengthOrHashMismatchError"):
        device.believe()
    device.network.answer = lambda name, data: iter(
        [Piece(0, data.replace(b"home/1", b"home/2") if "targets" in name else data, 4)]
    )
    with pytest.raises(IntegrityError):
        device.believe(2)


def test_a_release_that_nobody_signed_is_not_installed(device: Device) -> None:
    """Arbitrary installation: the online keys are the attacker's, the key of targets is not."""
    device.cloud.signers["targets"] = [signer("evil")]
    device.publish(2, b"evil")
    with pytest.raises(IntegrityError, match="targets was signed by 0/1 keys"):
        device.believe(2)


def test_a_release_of_another_channel_is_not_installed(device: Device) -> None:
    device.cloud.add("garden/2", b"not ours")
    device.cloud.publish()
    with pytest.raises(IntegrityError, match="lists no manifest home/2"):
        device.believe(2)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_older_metadata_is_refused(device: Device, role: str) -> None:
    """Rollback: what was signed once is given again, after newer was believed."""
    old = device.cloud.state()
    device.publish(2, b"two")
    assert device.believe(2) == b"two"
    if role == "timestamp":
        device.cloud.files.update(old)
    else:  # the attacker has the online keys, too
        device.cloud.timestamp.version += 10
        if role == "snapshot":
            device.cloud.snapshot.version -= 2
        else:
            device.cloud.targets.version -= 1
        device.cloud.publish_snapshot()
        device.cloud.publish_timestamp()
    with pytest.raises(IntegrityError, match="BadVersionNumberError"):
        device.believe()


def test_a_rollback_is_refused_after_a_power_loss_between_any_two_files(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.believe()
    old = device.cloud.state()
    device.publish(2, b"two")
    new = device.cloud.state()
    before = {p: p.read_bytes() for p in (device.folder / "trust").rglob("*") if p.is_file()}
    replace, deaths = os.replace, 0

    def killed(path: str, target: str) -> None:
        nonlocal deaths
        if deaths == 0:
            raise KeyboardInterrupt
        deaths -= 1
        replace(path, target)

    for n in range(10):
        for path, data in before.items():
            path.write_bytes(data)
        deaths = n
        device.cloud.files = dict(new)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", killed)
            try:
                done = device.believe(2) == b"two"
            except KeyboardInterrupt:
                done = False
        kept = json.loads((device.folder / "trust/metadata/timestamp.json").read_text())
        if kept["signed"]["version"] > json.loads(old["timestamp.json"])["signed"]["version"]:
            device.cloud.files = dict(old)
            with pytest.raises(IntegrityError, match="BadVersionNumberError"):
                device.believe(2)
            device.cloud.files = dict(new)
        assert device.believe(2) == b"two"
        if done:
            break
    assert 0 < n < 9, "one death for each file that was written, and one run without"


def test_a_fast_forward_is_over_when_the_online_keys_are_replaced(device: Device) -> None:
    """Fast-forward: stolen online keys sign versions that nothing real will ever reach."""
    device.believe()
    real = (device.cloud.snapshot.version, device.cloud.timestamp.version)
    device.cloud.snapshot.version = device.cloud.timestamp.version = 2**31
    device.cloud.publish_snapshot()
    device.cloud.publish_timestamp()
    device.believe()
    device.cloud.snapshot.version, device.cloud.timestamp.version = real
    device.publish(2, b"two")
    with pytest.raises(IntegrityError, match="BadVersionNumberError"):
        device.believe(2)
    device.cloud.rotate("snapshot", "new snapshot")
    device.cloud.rotate("timestamp", "new timestamp")
    device.cloud.publish()
    assert device.believe(2) == b"two"


def test_a_device_that_is_held_back_notices(device: Device) -> None:
    """Freeze: the network gives the same good old metadata for ever."""
    assert device.believe() == b"one"
    frozen = device.cloud.state()
    device.publish(2, b"two")
    new, device.cloud.files = device.cloud.files, frozen
    device.now += DAY_S - 60
    assert device.believe(kept=b"one") == b"one"
    device.now += 120
    with pytest.raises(ExpiredError, match=r"timestamp.*expired.*held back"):
        device.believe(kept=b"one")
    device.cloud.files = new
    device.renew()
    assert device.believe(2) == b"two"


@pytest.mark.parametrize("role", ["root", "targets", "snapshot"])
def test_every_roles_expiry_counts(device: Device, role: str) -> None:
    getattr(device.cloud, role).expires = device.cloud.at(NOW - 1)
    if role == "root":
        device.cloud.publish_root()
    device.cloud.publish()
    with pytest.raises(ExpiredError, match=role):
        device.believe()


@pytest.mark.parametrize("victim", ["timestamp.json", "2.root.json", "targets", "snapshot", "blob"])
def test_endless_data_ends(device: Device, victim: str) -> None:
    """Endless data: more comes than was signed, or than a device reads of an unsigned length."""
    device.cloud.publish_root()
    sent = 0

    def endless(name: str, data: bytes) -> Iterator[Piece]:
        nonlocal sent
        yield Piece(0, data, len(data))
        if victim in name or (victim == "blob" and len(name) == 64):
            while sent < ENDLESS:
                sent += 1 << 16
                yield Piece(sent, bytes(1 << 16), ENDLESS)

    device.network.answer = endless
    with pytest.raises(IntegrityError, match="DownloadLengthMismatchError"):
        device.believe()
    assert 0 < sent <= 512 << 10
    device.network = Network(device.cloud)
    assert device.believe() == b"one"


def test_a_manifest_that_is_listed_too_big_is_not_fetched(device: Device) -> None:
    device.cloud.targets.targets["home/2"] = TargetFile(
        MAX_MANIFEST_BYTES + 1, {"sha256": "ab" * 32}, "home/2"
    )
    device.cloud.publish()
    with pytest.raises(IntegrityError, match="home/2"):
        device.believe(2)
    assert "ab" * 32 not in device.network.asked


def test_parts_of_two_states_do_not_mix(device: Device) -> None:
    """Mix-and-match: each file was signed, but they never were published together."""
    snapshot, targets = device.cloud.snapshot.version, device.cloud.targets.version
    old = device.cloud.state()
    device.publish(2, b"two")
    new = device.cloud.state()
    names = {"snapshot": snapshot, "targets": targets}
    for role, version in names.items():
        mixed = dict(new)
        mixed[f"{version + 1}.{role}.json"] = old[f"{version}.{role}.json"]
        device.cloud.files = mixed
        with pytest.raises(IntegrityError, match="LengthOrHashMismatchError"):
            device.believe(2)
    device.cloud.files = new
    assert device.believe(2) == b"two"


@pytest.mark.parametrize("victim", ["timestamp.json", "targets", "blob"])
def test_slow_retrieval_is_given_up(device: Device, victim: str) -> None:
    """Slow retrieval: bytes come so slowly that the device would wait for ever."""

    def dripping(name: str, data: bytes) -> Iterator[Piece]:
        slow = victim in name or (victim == "blob" and len(name) == 64)
        for at in range(len(data)):
            device.monotonic += 31 if slow else 0
            yield Piece(at, data[at : at + 1], len(data))

    device.network.answer = dripping
    with pytest.raises(UnavailableError, match="slower than"):
        device.believe()
    assert device.monotonic < 3 * GRACE_S
    device.network = Network(device.cloud)
    assert device.believe() == b"one"


def test_a_slow_line_is_no_attack(device: Device) -> None:
    def slow(_: str, data: bytes) -> Iterator[Piece]:
        for at in range(0, len(data), 100):
            device.monotonic += 0.3
            yield Piece(at, data[at : at + 100], len(data))

    device.network.answer = slow
    assert device.believe() == b"one"


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_wrong_key_is_refused(device: Device, role: str) -> None:
    device.cloud.signers[role] = [signer("evil")]
    if role == "root":
        device.cloud.publish_root()
    device.publish(2, b"evil")
    with pytest.raises(IntegrityError, match=f"{role} was signed by 0/1 keys"):
        device.believe(2)


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_a_revoked_key_is_refused_and_the_new_one_believed(device: Device, role: str) -> None:
    device.believe()
    stolen = device.cloud.signers[role]
    device.cloud.rotate(role, "new")
    device.cloud.publish()
    assert device.believe() == b"one"
    ours, device.cloud.signers[role] = device.cloud.signers[role], stolen
    if role == "root":
        device.cloud.publish_root()
    device.publish(2, b"evil")
    with pytest.raises(IntegrityError, match=f"{role} was signed by 0/1 keys"):
        device.believe(2)
    if role == "root":
        del device.cloud.files[f"{device.cloud.root.version}.root.json"]
        device.cloud.root.version -= 1
    device.cloud.signers[role] = ours
    device.publish(2, b"two")
    assert device.believe(2) == b"two"


def test_a_threshold_needs_as_many_keys(device: Device) -> None:
    second = signer("second")
    device.cloud.root.add_key(second.public_key, "targets")
    device.cloud.root.roles["targets"].threshold = 2
    device.cloud.publish_root()
    device.publish(2, b"two")
    with pytest.raises(IntegrityError, match="targets was signed by 1/2 keys"):
        device.believe(2)
    device.cloud.signers["targets"] *= 2  # one key twice is one
    device.publish(2, b"two")
    with pytest.raises(IntegrityError, match="targets was signed by 1/2 keys"):
        device.believe(2)
    device.cloud.signers["targets"][1] = second
    device.publish(2, b"two")
    assert device.believe(2) == b"two"


def test_a_device_that_was_away_for_years_follows_the_roots(device: Device) -> None:
    for year in range(5):
        device.now += 365 * DAY_S
        for expiring in (device.cloud.root, device.cloud.targets):
            expiring.expires = device.cloud.at(device.now + 365 * DAY_S)
        device.cloud.rotate("root", f"year {year}")
        device.cloud.signers["root"] = device.cloud.signers["root"][-2:]
    device.renew()
    device.cloud.publish()
    assert device.believe() == b"one"


def test_a_clock_that_is_fast_says_so_and_heals(device: Device) -> None:
    device.believe()
    device.now += 10 * 365 * DAY_S
    with pytest.raises(ExpiredError, match=r"2037-01-12 08:00 UTC, this device's time: its clock"):
        device.believe(kept=b"one")
    device.now = NOW + 60
    assert device.believe(kept=b"one") == b"one"


def test_a_clock_without_a_battery_is_not_taken_back_to_what_has_expired(device: Device) -> None:
    frozen = device.cloud.state()
    device.now += 2 * DAY_S
    device.renew()
    device.believe()
    device.now = 0.0  # 1970: nothing has expired yet
    assert device.believe() == b"one"
    device.cloud.timestamp.expires = device.cloud.at(NOW + DAY_S)
    device.cloud.publish_timestamp()  # newer, and past its expiry by all that this device knows
    with pytest.raises(ExpiredError):
        device.believe()
    device.cloud.files = frozen
    with pytest.raises(IntegrityError, match="BadVersionNumberError"):
        device.believe()


def test_a_clock_that_was_fast_for_a_while_does_not_stop_updates_for_long(device: Device) -> None:
    """It is noted only while something is believed: no further ahead than what was newest."""
    device.now += DAY_S - 60
    device.believe()
    device.now = NOW + 3600
    device.renew()
    assert device.believe() == b"one"


def test_a_damaged_note_of_the_time_is_set_aside(device: Device) -> None:
    device.believe()
    note = device.folder / "trust" / "clock.json"
    note.write_bytes(b"{")
    assert device.believe() == b"one"
    assert note.with_name("clock.json.corrupt-1").exists()
    assert json.loads(note.read_text())["believed_at"] == NOW


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json"])
@pytest.mark.parametrize("damage", [b"", b"{", b"garbage"])
def test_damaged_metadata_on_the_disk_is_fetched_again(
    device: Device, name: str, damage: bytes
) -> None:
    device.believe()
    (device.folder / "trust" / "metadata" / name).write_bytes(damage)
    assert device.believe() == b"one"


def test_a_full_disk_is_a_storage_error(device: Device) -> None:
    (device.folder / "trust").write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageError, match="trust"):
        device.believe()


def test_a_cloud_without_metadata_is_asked_again(device: Device) -> None:
    device.cloud.files.clear()
    with pytest.raises(UnavailableError, match="timestamp"):
        TufReleases(
            root=TufRepository(NOW).trusted_root,
            folder=device.folder,
            channel="home",
            transport=device.network,
            clock=lambda: NOW,
        ).manifest(1)


def test_a_root_file_is_checked_when_the_agent_starts(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "root.json"
    with pytest.raises(InvalidInputError, match=r"is not there: copy the cloud's tuf/root\.json"):
        load_root(file)
    file.write_bytes(device.cloud.trusted_root)
    assert load_root(file) == device.cloud.trusted_root
    for bad, why in (
        (b"", "no trusted root"),
        (b"-----BEGIN PUBLIC KEY-----\n", "a public key from before"),
        (device.cloud.files["timestamp.json"], r"no trusted root \(timestamp\)"),
        (device.cloud.trusted_root.replace(b'"version":1', b'"version":2'), "0/1 keys"),
    ):
        file.write_bytes(bad)
        with pytest.raises(InvalidInputError, match=why):
            load_root(file)


def test_the_fetcher_is_python_tufs_interface(device: Device) -> None:
    from edge.update.tuf_fetcher import Fetcher

    fetcher = Fetcher(transport=device.network, monotonic=lambda: 0.0)
    assert isinstance(fetcher, FetcherInterface)
    root = fetcher.download_bytes("metadata/1.root.json", 10_000)
    assert isinstance(Metadata[Root].from_bytes(root).signed, Root)
