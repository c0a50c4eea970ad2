"""Which releases a device believes: those in a TUF repository whose root came with the device.

The Update Framework (https://theupdateframework.github.io/specification/latest/) says how: the
root that the device ships with leads to the newest root, this one to a timestamp and a snapshot
signed online, and these to the list of targets signed offline. A manifest is believed when its
length and SHA-256 are in that list, under ``CHANNEL/VERSION``. The rules are python-tuf's; this
module gives them a network, a disk that survives a power loss, and a clock.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tuf.api.exceptions import (
    DownloadError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root
from tuf.ngclient import Updater, UpdaterConfig

from edge.delta.files import make_folder, set_aside, storage_errors, write_atomic, write_changed
from edge.update.manifest import MAX_MANIFEST_BYTES
from edge.update.tuf_fetcher import METADATA, TARGETS, Fetcher
from protos.errors import (
    ExpiredError,
    IntegrityError,
    InvalidInputError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tuf.api.metadata import TargetFile

    from edge.update.transport import Transport

_log = logging.getLogger(__name__)

MAX_TARGETS_BYTES = 8 << 20
"""Of the list of all releases; a release takes some 150 bytes."""

_CONFIG = UpdaterConfig(
    root_max_length=256 << 10,
    timestamp_max_length=16 << 10,
    snapshot_max_length=64 << 10,
    targets_max_length=MAX_TARGETS_BYTES,
)
_NOTE_TIME_S = 600.0  # how far the clock moves on before it is noted: flash wears out
_SHA256 = "sha256"


class TrustedReleases(Protocol):
    """Decides which manifests are to be believed."""

    @property
    def channel(self) -> str:
        """The channel whose releases are asked for."""
        ...

    def manifest(self, release: int, *, kept: bytes = b"") -> bytes:
        """The bytes of a release's manifest, believed now.

        Args:
            release: its version.
            kept: bytes that are here already; they come back when they are the right ones still.

        Raises:
            IntegrityError: what the cloud sent cannot be trusted.
            ExpiredError: what it sent is out of date by the clock here.
            UnavailableError: the cloud does not answer, or is too slow.
            StorageError: the disk is full or failed.
        """
        ...

    def refresh(self) -> float:
        """Ask for what is newest; until when it is, in seconds since the epoch; raises as above."""
        ...


def load_root(path: Path) -> bytes:
    """The trusted root in a file, as ``anabranch edge --trust`` names it.

    Raises:
        InvalidInputError: it is not there, or no root that its own keys signed.
        StorageError: the file cannot be read.
    """
    if not path.exists():
        msg = f"{path} is not there: copy the cloud's tuf/root.json to it"
        raise InvalidInputError(msg)
    with storage_errors(f"reading the trusted root in {path}"):
        data = path.read_bytes()
    try:
        root = Metadata[Root].from_bytes(data)
        if not isinstance(root.signed, Root):
            raise RepositoryError(root.signed.type)  # noqa: TRY301 # one message for all
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    except RepositoryError as error:
        what = "a public key from before 0.2" if data.startswith(b"-----BEGIN") else error
        msg = f"{path} is no trusted root ({what}): copy the cloud's tuf/root.json there"
        raise InvalidInputError(msg) from error
    return data


class TufReleases:
    """Trust in a root that came with the device.

    Folder::

        metadata/      what was believed last, so that nothing older is believed after it
        clock.json     the latest time at which something was believed
    """

    def __init__(
        self,
        *,
        root: bytes,
        folder: Path,
        channel: str,
        transport: Transport,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Trust ``root`` until newer roots take its place.

        Args:
            root: from :func:`load_root`.
            folder: in the device's state.
            channel: whose releases are asked for.
            transport: where metadata and manifests come from.
            clock: seconds since the epoch.
            monotonic: seconds.
        """
        self._root = root
        self._metadata = folder / "metadata"
        self._noted = folder / "clock.json"
        self._channel = channel
        self._clock = clock
        self._fetcher = Fetcher(transport=transport, monotonic=monotonic)
        self._lock = threading.Lock()

    @property
    def channel(self) -> str:
        """See :class:`TrustedReleases`."""
        return self._channel

    def manifest(self, release: int, *, kept: bytes = b"") -> bytes:
        """See :class:`TrustedReleases`."""
        path = f"{self._channel}/{release}"
        with self._refreshed() as updater:
            return self._get(updater.get_targetinfo(path), path, kept)

    def refresh(self) -> float:
        """See :class:`TrustedReleases`."""
        with self._refreshed() as updater:
            return updater.fresh_until()

    @contextmanager
    def _refreshed(self) -> Iterator[_Updater]:
        """python-tuf's client after a refresh; one at a time works on the folder."""
        with self._lock, storage_errors(f"keeping metadata in {self._metadata}"):
            make_folder(self._metadata)
            now = self._now()
            with _refusals(now):
                updater = _Updater(
                    metadata_dir=str(self._metadata),
                    metadata_base_url=METADATA,
                    fetcher=self._fetcher,
                    config=_CONFIG,
                    bootstrap=self._root,
                )
                updater.judge_expiry_at(now)
                updater.refresh()
                self._note(now)
                yield updater

    def _get(self, target: TargetFile | None, path: str, kept: bytes) -> bytes:
        if target is None or _SHA256 not in target.hashes or target.length > MAX_MANIFEST_BYTES:
            msg = (
                f"the signed metadata lists no manifest {path} that this device reads: it is not "
                "run, the old student serves on"
            )
            raise IntegrityError(msg)
        try:
            target.verify_length_and_hashes(kept)
        except LengthOrHashMismatchError:
            kept = self._fetcher.download_bytes(TARGETS + target.hashes[_SHA256], target.length)
            target.verify_length_and_hashes(kept)
        return kept

    def _now(self) -> datetime:
        """The clock's time, but no earlier than any at which something was believed.

        So a device that starts without a battery for its clock is not taken back to where expired
        metadata was fresh. Nothing is believed past its expiry: a clock that was fast for a while
        moves this at most to the expiry of what was newest then.
        """
        return datetime.fromtimestamp(max(self._clock(), self._read_noted()), UTC)

    def _note(self, now: datetime) -> None:
        if now.timestamp() >= self._read_noted() + _NOTE_TIME_S:
            body = {"version": 1, "believed_at": now.timestamp()}
            write_atomic(self._noted, json.dumps(body).encode() + b"\n")

    def _read_noted(self) -> float:
        with storage_errors(f"reading {self._noted}"):
            data = self._noted.read_bytes() if self._noted.exists() else b""
        if not data:
            return 0.0
        try:
            body = json.loads(data)
            if body["version"] != 1:
                msg = f"version {body['version']!r} is not 1"
                raise ValueError(msg)  # noqa: TRY301 # one way to deal with all damage
            return float(body["believed_at"])
        except (ValueError, TypeError, KeyError) as error:
            set_aside(self._noted, str(error))
            return 0.0


class _Updater(Updater):
    """python-tuf's client, with our clock and with files that survive a power loss.

    It overrides what is private there, hence the exact bounds on its version in pyproject.toml;
    tests see that each of the three is used.
    """

    def judge_expiry_at(self, now: datetime) -> None:
        """Take ``now`` for the present time."""
        self._trusted_set.reference_time = now

    def fresh_until(self) -> float:
        """When the timestamp expires, in seconds since the epoch."""
        return self._trusted_set.timestamp.expires.timestamp()

    def _persist_file(self, filename: str, data: bytes) -> None:
        write_changed(Path(filename), data)

    def _update_root_symlink(self) -> None:
        """Nothing reads it where the root is given at each start."""


@contextmanager
def _refusals(now: datetime) -> Iterator[None]:
    """python-tuf's errors as ours, by what can be done about them."""
    try:
        yield
    except ExpiredMetadataError as error:
        msg = (
            f"{error} at {now:%Y-%m-%d %H:%M} UTC, this device's time: its clock is wrong, or "
            "newer metadata is held back, or the cloud does not renew it; the old student serves "
            "on, asking again later"
        )
        _log.warning(msg)
        raise ExpiredError(msg) from error
    except (RepositoryError, DownloadLengthMismatchError) as error:
        msg = (
            f"the cloud's signed metadata is refused ({type(error).__name__}: {error}); check the "
            "device's --trust file if this lasts. The old student serves on"
        )
        raise IntegrityError(msg) from error
    except DownloadError as error:
        msg = f"the cloud does not give its signed metadata ({error}); asking again later"
        raise UnavailableError(msg) from error
