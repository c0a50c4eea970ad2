"""The cloud's TUF repository: what it signs by itself, what waits for people, what a crash leaves.

A device's own trust (``edge/update/trust.py``) judges what it publishes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from prometheus_client import CollectorRegistry

from cloud.releases import ceremony, keys, overview, rotation
from cloud.releases.blobs import Blob
from cloud.releases.metadata import ROLES, Lifetimes
from cloud.releases.repository import Repository
from edge.student.bundle import FILES, BundleFile, digest_of
from edge.update.transport import Piece
from edge.update.trust import TufReleases, load_root
from protos.errors import ExpiredError, IntegrityError, InvalidInputError
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from protos.v1 import fleet_pb2

NOW = 1_800_000_000.0
DAY_S = 86_400.0


def manifest(version: int, channel: str = "home") -> bytes:
    files = [BundleFile(name, f"{version:064x}", 1) for name in FILES]
    return release_pb2.Manifest(
        channel=channel,
        version=version,
        student=digest_of(files),
        files=[release_pb2.File(name=f.name, sha256=f.sha256, size=f.size) for f in files],
        gate=[release_pb2.GateCheck(name="new", value=0.8, bound=0.5, passed=True)],
    ).SerializeToString()


class Network:
    """What a device reads, straight out of a repository."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    def read_metadata(self, name: str) -> Iterator[Piece]:
        data = self._cloud.repository.read(name)
        if data is None:
            msg = f"no {name}"
            raise InvalidInputError(msg)
        yield Piece(0, data, len(data))

    def read(self, sha256: str, offset: int) -> Iterator[Piece]:
        data = self._cloud.blobs[sha256][offset:]
        yield Piece(offset, data, offset + len(data))

    def watch(self, *, student: str, release: int) -> Iterator[int]:
        raise NotImplementedError

    def report(self, report: fleet_pb2.UpdateReport) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Cloud:
    """A repository on a state folder, a safe for keys, and a device that shipped with its root."""

    def __init__(self, folder: Path) -> None:
        self.state, self.safe, self.device = folder / "state", folder / "safe", folder / "device"
        self.safe.mkdir(parents=True, exist_ok=True)
        self.now = NOW
        self.blobs: dict[str, bytes] = {}
        self.wanted: dict[str, Blob] = {}
        self.restart()
        self.root = load_root(self.state / "tuf" / "root.json")

    def restart(self) -> None:
        self.registry = CollectorRegistry()
        self.repository = Repository(
            state=self.state, clock=lambda: self.now, registry=self.registry
        )
        self.update()

    def update(self) -> None:
        self.repository.update(self.wanted, self.blobs.__getitem__)

    def release(self, version: int) -> bool:
        """Whether devices may believe a release once the cloud has seen to it."""
        data = manifest(version)
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
        self.blobs[blob.sha256] = data
        self.wanted[f"home/{version}"] = blob
        self.update()
        return self.repository.lists(f"home/{version}", blob)

    def believes(self, version: int) -> bool:
        """Whether the device does."""
        trusted = TufReleases(
            root=self.root,
            folder=self.device,
            channel="home",
            transport=Network(self),
            clock=lambda: self.now,
        )
        try:
            return trusted.manifest(version) == manifest(version)
        except IntegrityError as error:
            assert f"lists no manifest home/{version}" in str(error)  # noqa: PT017 # others fail
            return False

    def take_away(self, *roles: str) -> None:
        """Keys into the safe."""
        for role in roles:
            shutil.move(self.state / "keys" / f"{role}.pem", self.safe / f"{role}.pem")

    @property
    def to_sign(self) -> Path:
        return self.state / "tuf" / "to-sign"

    def sign_offline(self, *names: str) -> None:
        """Carry the folder to the safe, sign there, and bring it back."""
        away = self.safe / "to-sign"
        shutil.copytree(self.to_sign, away)
        for name in names:
            ceremony.add_signature(away, keys.load(self.safe / f"{name}.pem"))
        shutil.copytree(away, self.to_sign, dirs_exist_ok=True)
        shutil.rmtree(away)

    def change(self, role: str, **change: object) -> None:
        rotation.propose(
            self.state,
            rotation.Change(roles=[role], **change),  # type: ignore[arg-type] # passed through
            lifetimes=Lifetimes(),
            now=self.now,
        )

    def keys_of(self, role: str) -> tuple[str, ...]:
        return next(r.keys for r in overview.roles(self.state) if r.name == role)

    def expires(self, role: str) -> float:
        name = "anabranch_trust_expires_timestamp_seconds"
        value = self.registry.get_sample_value(name, {"role": role})
        assert value is not None
        return value


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_the_first_start_makes_keys_that_only_their_owner_can_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cloud = Cloud(tmp_path)
    files = sorted((cloud.state / "keys").iterdir())
    assert [f.name for f in files] == [f"{r}{s}" for r in sorted(ROLES) for s in (".pem", ".pub")]
    for file in files:
        private = file.suffix == ".pem"
        assert (stat.S_IMODE(file.stat().st_mode) == 0o600) is private
    assert str(cloud.state / "keys") in caplog.text
    caplog.clear()
    cloud.restart()
    assert "new keys" not in caplog.text


def test_with_all_keys_a_release_is_believed_at_once_and_after_a_restart(cloud: Cloud) -> None:
    assert cloud.release(1)
    assert cloud.believes(1)
    cloud.restart()
    assert cloud.believes(1)
    assert not cloud.believes(2)
    assert not cloud.to_sign.exists()


def test_nothing_is_signed_again_while_nothing_changes(cloud: Cloud) -> None:
    cloud.release(1)
    files = {p: p.stat().st_mtime_ns for p in (cloud.state / "tuf").rglob("*.json")}
    for _ in range(3):
        cloud.now += 60
        cloud.update()
        cloud.restart()
    assert files == {p: p.stat().st_mtime_ns for p in (cloud.state / "tuf").rglob("*.json")}


def test_a_running_cloud_renews_what_it_signs_online(cloud: Cloud) -> None:
    cloud.release(1)
    cloud.take_away("root", "targets")
    for _ in range(60):
        cloud.now += DAY_S / 2
        cloud.update()
        assert cloud.believes(1)
    assert cloud.expires("timestamp") > cloud.now
    assert len(list((cloud.state / "tuf/metadata").iterdir())) < 12, "old ones are deleted"
    cloud.now += 2 * DAY_S  # the cloud stands still
    with pytest.raises(ExpiredError):
        cloud.believes(1)


def test_with_the_keys_here_root_and_targets_are_renewed_as_well(cloud: Cloud) -> None:
    cloud.release(1)
    for _ in range(8):
        cloud.now += 100 * DAY_S
        cloud.update()
        assert cloud.believes(1)
    assert not cloud.to_sign.exists()
    assert min(cloud.expires("root"), cloud.expires("targets")) > cloud.now + 80 * DAY_S


def test_without_the_key_of_targets_a_release_waits_until_it_was_signed_offline(
    cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.release(1)
    cloud.take_away("root", "targets")
    assert not cloud.release(2)
    assert "to be signed: targets" in caplog.text
    assert cloud.believes(1)
    assert not cloud.believes(2)
    (wanting,) = ceremony.look(cloud.to_sign)
    assert (wanting.role, wanting.missing) == ("targets", 1)
    assert any("home/2" in line and "new 0.800" in line for line in wanting.lines)
    assert not any("home/1" in line for line in wanting.lines)
    cloud.restart()
    cloud.sign_offline("targets")
    cloud.update()
    assert cloud.believes(2)
    assert not cloud.to_sign.exists()


def test_a_threshold_takes_as_many_people(cloud: Cloud) -> None:
    for name in ("anna", "ben", "cleo"):
        keys.make(cloud.safe / f"{name}.pem")
    public = [keys.load_public(cloud.safe / f"{name}.pub") for name in ("anna", "ben", "cleo")]
    cloud.change("targets", add=public, remove=cloud.keys_of("targets"), threshold=2)
    cloud.update()  # the key of root is here; targets want two of the three now
    assert [w.missing for w in ceremony.look(cloud.to_sign)] == [0, 2]
    assert cloud.believes(1) is False
    cloud.sign_offline("anna")
    cloud.update()
    assert [w.missing for w in ceremony.look(cloud.to_sign)] == [0, 1]
    cloud.sign_offline("cleo")
    cloud.update()
    assert not cloud.to_sign.exists()
    assert not cloud.release(1)
    cloud.sign_offline("ben")
    cloud.update()
    assert not cloud.believes(1)
    cloud.sign_offline("ben", "cleo")
    cloud.update()
    assert cloud.believes(1)


def test_a_release_made_meanwhile_waits_for_its_own_signature(cloud: Cloud) -> None:
    cloud.take_away("targets")
    cloud.release(1)
    away = cloud.safe / "to-sign"
    shutil.copytree(cloud.to_sign, away)
    cloud.release(2)
    ceremony.add_signature(away, keys.load(cloud.safe / "targets.pem"))
    shutil.copytree(away, cloud.to_sign, dirs_exist_ok=True)
    shutil.rmtree(away)
    cloud.update()
    assert cloud.believes(1)
    assert not cloud.believes(2)
    cloud.sign_offline("targets")
    cloud.update()
    assert cloud.believes(2)


def test_what_comes_back_damaged_is_laid_out_again(cloud: Cloud) -> None:
    cloud.take_away("targets")
    cloud.release(1)
    (cloud.to_sign / "targets.json").write_bytes(b"half a fi")
    cloud.update()
    cloud.sign_offline("targets")
    cloud.update()
    assert cloud.believes(1)


def test_signatures_of_a_stranger_publish_nothing(cloud: Cloud) -> None:
    cloud.take_away("targets")
    cloud.release(1)
    keys.make(cloud.safe / "stranger.pem")
    with pytest.raises(InvalidInputError, match="is not one that"):
        ceremony.add_signature(cloud.to_sign, keys.load(cloud.safe / "stranger.pem"))
    cloud.update()
    assert not cloud.believes(1)


def test_nothing_is_signed_offline_that_cannot_be_looked_at(cloud: Cloud) -> None:
    cloud.take_away("targets")
    cloud.release(1)
    signer = keys.load(cloud.safe / "targets.pem")
    file = cloud.to_sign / "manifests" / cloud.wanted["home/1"].sha256
    file.write_bytes(manifest(1).replace(b"new", b"old"))
    with pytest.raises(IntegrityError, match="home/1, is missing or another one"):
        ceremony.add_signature(cloud.to_sign, signer)
    file.unlink()
    with pytest.raises(IntegrityError, match="home/1"):
        ceremony.look(cloud.to_sign)
    with pytest.raises(InvalidInputError, match="nothing to sign"):
        ceremony.look(cloud.safe)


@pytest.mark.parametrize("role", ROLES)
def test_a_key_is_replaced_and_devices_follow(cloud: Cloud, role: str) -> None:
    cloud.release(1)
    assert cloud.believes(1)
    old = cloud.keys_of(role)
    new = keys.make(cloud.state / "keys" / f"{role}-2.pem").public_key
    cloud.change(role, add=[new], remove=[old[0][:12]])
    cloud.update()
    assert cloud.keys_of(role) == (new.keyid,)
    (cloud.state / "keys" / f"{role}.pem").unlink()
    cloud.release(2)
    cloud.restart()
    assert cloud.believes(2)
    assert (cloud.state / "tuf/root.json").read_bytes() == cloud.repository.read("2.root.json")


def test_a_stolen_key_of_targets_is_replaced_while_all_offline_keys_are_away(cloud: Cloud) -> None:
    cloud.release(1)
    cloud.take_away("root", "targets")
    new = keys.make(cloud.safe / "targets-2.pem").public_key
    cloud.change("targets", add=[new], remove=cloud.keys_of("targets"))
    cloud.update()
    assert cloud.believes(1), "the old root stays in force until all is signed"
    assert [w.missing for w in ceremony.look(cloud.to_sign)] == [1, 1]
    cloud.sign_offline("root")
    cloud.update()
    assert cloud.believes(1)
    cloud.sign_offline("targets-2")
    cloud.update()
    assert cloud.believes(1)
    assert cloud.keys_of("targets") == (new.keyid,)
    assert not cloud.release(2)
    with pytest.raises(InvalidInputError):
        cloud.sign_offline("targets")


def test_a_root_whose_online_keys_are_not_here_is_not_taken_over(
    cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.release(1)
    new = keys.make(cloud.safe / "timestamp-2.pem").public_key
    cloud.change("timestamp", add=[new], remove=cloud.keys_of("timestamp"))
    cloud.update()
    assert "keys that it names for timestamp are not in" in caplog.text
    assert cloud.believes(1)
    shutil.copy(cloud.safe / "timestamp-2.pem", cloud.state / "keys")
    cloud.update()
    assert cloud.keys_of("timestamp") == (new.keyid,)
    assert cloud.believes(1)


def test_both_online_keys_are_replaced_by_one_change(cloud: Cloud) -> None:
    cloud.release(1)
    new = keys.make(cloud.state / "keys" / "online-2.pem").public_key
    old = [*cloud.keys_of("snapshot"), *cloud.keys_of("timestamp")]
    change = rotation.Change(roles=["snapshot", "timestamp"], add=[new], remove=old)
    rotation.propose(cloud.state, change, lifetimes=Lifetimes(), now=cloud.now)
    cloud.update()
    assert {*cloud.keys_of("snapshot"), *cloud.keys_of("timestamp")} == {new.keyid}
    assert cloud.believes(1)


def test_changes_that_would_leave_nobody_are_refused(cloud: Cloud) -> None:
    for role, change, why in (
        ("mirror", {}, "no role"),
        ("targets", {"threshold": 2}, "add keys first"),
        ("targets", {"remove": cloud.keys_of("targets")}, "0 keys"),
        ("targets", {"remove": ["ab"]}, "names no one key"),
        ("targets", {"remove": ["0" * 64]}, "names no one key"),
    ):
        with pytest.raises(InvalidInputError, match=why):
            cloud.change(role, **change)
    assert not cloud.to_sign.exists()


def test_a_lost_online_key_is_said_and_what_is_published_stays(cloud: Cloud) -> None:
    cloud.release(1)
    cloud.take_away("timestamp")
    with pytest.raises(InvalidInputError, match="key of timestamp is not in"):
        cloud.release(2)
    assert cloud.believes(1)
    shutil.copy(cloud.safe / "timestamp.pem", cloud.state / "keys")
    cloud.update()
    assert cloud.believes(2)


def test_a_cloud_restored_from_a_backup_is_not_taken_for_an_attacker(
    cloud: Cloud, tmp_path: Path
) -> None:
    cloud.release(1)
    shutil.copytree(cloud.state, tmp_path / "backup")
    for version in (2, 3, 4):
        cloud.now += 3600
        cloud.release(version)
    assert cloud.believes(4)
    shutil.rmtree(cloud.state)
    shutil.copytree(tmp_path / "backup", cloud.state)
    cloud.now += 3600
    for version in (2, 3, 4):
        del cloud.wanted[f"home/{version}"]
    cloud.restart()
    assert cloud.release(5)
    assert cloud.believes(5)


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot"])
def test_damaged_online_metadata_is_made_anew(cloud: Cloud, name: str) -> None:
    cloud.release(1)
    cloud.believes(1)
    for file in (cloud.state / "tuf/metadata").glob(f"*{name}*"):
        file.write_bytes(b"{")
    cloud.now += 1
    cloud.restart()
    assert cloud.believes(1)


@pytest.mark.parametrize("pattern", ["*.root.json", "*.targets.json"])
def test_damaged_offline_metadata_stops_the_start(cloud: Cloud, pattern: str) -> None:
    cloud.release(1)
    for file in (cloud.state / "tuf/metadata").glob(pattern):
        file.write_bytes(b"{")
    with pytest.raises(IntegrityError, match="restore"):
        cloud.restart()


def test_a_power_loss_between_any_two_files_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """First start, a release, new keys of all roles: killed before each file that is replaced."""
    caplog.set_level(logging.CRITICAL)
    replace, left = os.replace, 0

    def dying(source: str, target: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(source, target)

    def life(folder: Path) -> Cloud:
        cloud = Cloud(folder)
        cloud.release(1)
        for role in ROLES:
            file = cloud.state / "keys" / f"new-{role}.pem"
            public = (keys.load(file) if file.exists() else keys.make(file)).public_key
            if public.keyid not in cloud.keys_of(role):
                cloud.change(role, add=[public])
                cloud.update()
        return cloud

    died, done = -1, False
    while not done:
        died += 1
        folder = tmp_path / str(died)
        left = died
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", dying)
            life(folder)
            done = True
        known = folder / "state" / "tuf" / "root.json"
        shipped = load_root(known) if known.exists() else b""
        cloud = life(folder)
        cloud.root = shipped or cloud.root
        assert cloud.believes(1)
        assert [len(cloud.keys_of(role)) for role in ROLES] == [2] * 4
    assert died > 15


def test_a_key_file_is_checked(tmp_path: Path) -> None:
    signer = keys.make(tmp_path / "a.pem")
    assert keys.load(tmp_path / "a.pem").public_key == signer.public_key
    assert keys.load_public(tmp_path / "a.pub") == signer.public_key
    assert list(keys.signers(tmp_path)) == [signer.public_key.keyid]
    with pytest.raises(InvalidInputError, match="never overwritten"):
        keys.make(tmp_path / "a.pem")
    with pytest.raises(InvalidInputError, match=r"does not end in \.pem"):
        keys.make(tmp_path / "a")
    (tmp_path / "a.pem").chmod(0o640)
    with pytest.raises(InvalidInputError, match=r"0640.*chmod 600"):
        keys.load(tmp_path / "a.pem")
    (tmp_path / "a.pem").chmod(0o600)
    (tmp_path / "a.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n")
    with pytest.raises(IntegrityError, match=r"a\.pem"):
        keys.load(tmp_path / "a.pem")
    pem = X25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    (tmp_path / "a.pem").write_bytes(pem)
    with pytest.raises(InvalidInputError, match="not ed25519"):
        keys.load(tmp_path / "a.pem")
    for bad in (b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        (tmp_path / "a.pub").write_bytes(bad)
        with pytest.raises(InvalidInputError, match=r"a\.pub"):
            keys.load_public(tmp_path / "a.pub")
    for load in (keys.load, keys.load_public):
        with pytest.raises(InvalidInputError, match="is not there"):
            load(tmp_path / "absent.pem")
