"""The outbox keeps what it has taken until the cloud has answered."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from itertools import count
from typing import TYPE_CHECKING

import pytest

from edge.link.outbox import DEMONSTRATION, DRIFT, MAX_PAYLOAD, Counts, Item, Outbox
from edge.link.sqlite import corrupt_copies
from protos.errors import InvalidInputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    with closing(Outbox(path, clock=lambda: 1000.0)) as box:
        yield box


def test_items_come_out_oldest_first_and_stay(outbox: Outbox) -> None:
    for n in range(5):
        assert outbox.put(DEMONSTRATION if n % 2 else DRIFT, f"id-{n}", bytes([n]))
    assert outbox.pending(2) == [Item("id-0", DRIFT, b"\0"), Item("id-1", DEMONSTRATION, b"\1")]
    assert len(outbox.pending(99)) == 5


def test_only_what_the_cloud_stored_leaves(outbox: Outbox) -> None:
    for n in range(3):
        outbox.put(DEMONSTRATION, f"id-{n}", b"xy")
    assert outbox.stored(["id-0", "id-2", "never seen"]) == Counter({DEMONSTRATION: 2})
    assert [i.id for i in outbox.pending(9)] == ["id-1"]
    assert outbox.counts() == Counts(waiting=1, rejected=0, bytes=2)


def test_the_same_message_twice_is_one_item(outbox: Outbox) -> None:
    assert outbox.put(DEMONSTRATION, "id", b"x")
    assert not outbox.put(DEMONSTRATION, "id", b"x")
    with pytest.raises(InvalidInputError, match="already belongs"):
        outbox.put(DEMONSTRATION, "id", b"another")
    assert outbox.counts() == Counts(waiting=1, rejected=0, bytes=1)


def test_a_rejected_item_is_set_aside_with_the_reason_and_never_lost(
    outbox: Outbox, path: Path
) -> None:
    outbox.put(DEMONSTRATION, "id", b"x")
    assert outbox.reject("id", "no correction in it")
    assert not outbox.reject("id", "again")
    assert not outbox.reject("never seen", "?")
    assert outbox.pending(9) == []
    assert not outbox.put(DEMONSTRATION, "id", b"x"), "it is not sent once more"
    outbox.close()
    with closing(Outbox(path, clock=lambda: 0)) as again:
        (item,) = again.rejected(9)
        assert (item.id, item.payload, item.created) == ("id", b"x", 1000.0)
        assert item.reason == "no correction in it"
        assert again.counts() == Counts(waiting=0, rejected=1, bytes=1)


def test_counts_can_be_of_one_kind(outbox: Outbox) -> None:
    outbox.put(DEMONSTRATION, "a", b"xyz")
    outbox.put(DRIFT, "b", b"x")
    assert outbox.counts(DEMONSTRATION) == Counts(waiting=1, rejected=0, bytes=3)


@pytest.mark.parametrize(
    ("kind", "item_id", "payload", "says"),
    [
        (DEMONSTRATION, "id", b"x" * (MAX_PAYLOAD + 1), "65537 bytes; the limit is 65536"),
        ("birth", "id", b"x", "'birth'"),
        (DRIFT, "", b"x", "with an id"),
    ],
)
def test_what_the_cloud_would_reject_is_refused_at_once(
    outbox: Outbox, kind: str, item_id: str, payload: bytes, says: str
) -> None:
    with pytest.raises(InvalidInputError, match=says):
        outbox.put(kind, item_id, payload)
    assert outbox.counts().waiting == 0


def test_a_full_outbox_says_so_and_takes_again_when_the_cloud_has_stored(path: Path) -> None:
    with closing(Outbox(path, clock=lambda: 0, max_bytes=100)) as outbox:
        outbox.put(DEMONSTRATION, "a", b"x" * 60)
        with pytest.raises(StorageError, match="60 of 100 bytes wait for the cloud"):
            outbox.put(DEMONSTRATION, "b", b"x" * 60)
        assert [i.id for i in outbox.pending(9)] == ["a"]
        outbox.stored(["a"])
        assert outbox.put(DEMONSTRATION, "b", b"x" * 60)


def test_the_bound_holds_after_a_restart(path: Path) -> None:
    with closing(Outbox(path, clock=lambda: 0, max_bytes=100)) as outbox:
        outbox.put(DEMONSTRATION, "a", b"x" * 60)
    with (
        closing(Outbox(path, clock=lambda: 0, max_bytes=100)) as outbox,
        pytest.raises(StorageError, match="full"),
    ):
        outbox.put(DEMONSTRATION, "b", b"x" * 60)


def test_a_full_disk_is_a_clear_error_and_nothing_is_half_written(outbox: Outbox) -> None:
    outbox.put(DEMONSTRATION, "before", b"x")
    db = outbox._db
    db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(StorageError, match=r"cannot put demonstration too-much.*full"):
        outbox.put(DEMONSTRATION, "too-much", b"x" * MAX_PAYLOAD)
    assert outbox.counts() == Counts(waiting=1, rejected=0, bytes=1)
    db.execute("PRAGMA max_page_count=1000000")
    assert outbox.put(DEMONSTRATION, "too-much", b"x" * MAX_PAYLOAD)
    assert outbox.counts() == Counts(waiting=2, rejected=0, bytes=1 + MAX_PAYLOAD)


def test_a_corrupt_file_is_set_aside_and_its_readable_items_are_kept(path: Path) -> None:
    with closing(Outbox(path, clock=lambda: 0)) as outbox:
        for n in range(300):
            outbox.put(DEMONSTRATION, f"id-{n}", bytes(500))
    data = bytearray(path.read_bytes())
    middle = len(data) // 4096 // 2 * 4096
    data[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    with closing(Outbox(path, clock=lambda: 0)) as outbox:
        assert outbox.set_aside is not None
        assert corrupt_copies(path) == [outbox.set_aside]
        assert outbox.recovered == outbox.counts().waiting > 250
        assert outbox.put(DEMONSTRATION, "new", b"x")
    with closing(Outbox(path, clock=lambda: 0)) as outbox:
        assert outbox.set_aside is None


def test_a_corrupt_file_of_which_nothing_is_left_does_not_stop_the_device(path: Path) -> None:
    path.write_bytes(b"\0garbage" * 999)
    with closing(Outbox(path, clock=lambda: 0)) as outbox:
        assert (outbox.recovered, outbox.counts().waiting) == (0, 0)
        assert outbox.set_aside is not None
        assert outbox.set_aside.read_bytes() == b"\0garbage" * 999


def test_session_numbers_grow_over_restarts_and_lost_files(path: Path) -> None:
    with closing(Outbox(path, clock=lambda: 5.0)) as outbox:
        assert [outbox.next_session() for _ in range(3)] == [5000, 5001, 5002]
    with closing(Outbox(path, clock=lambda: 1.0)) as outbox:
        assert outbox.next_session() == 5003, "even when the clock was set back"
    path.unlink()
    with closing(Outbox(path, clock=lambda: 60.0)) as outbox:
        assert outbox.next_session() == 60_000


def test_many_threads_can_put_at_once(outbox: Outbox) -> None:
    def put(worker: int) -> None:
        for n in range(20):
            outbox.put(DEMONSTRATION, f"{worker}-{n}", b"x")

    threads = [threading.Thread(target=put, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outbox.counts() == Counts(waiting=80, rejected=0, bytes=80)


def test_a_demonstration_survives_sigkill_right_after_put(path: Path) -> None:
    program = f"""
import pathlib, sys, time
from edge.link.outbox import Outbox
outbox = Outbox(pathlib.Path({str(path)!r}), clock=time.time)
for n in range(1_000_000):
    outbox.put("demonstration", f"id-{{n}}", b"payload")
    print(n, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 20:
                break
        process.send_signal(signal.SIGKILL)
        told = [int(line), *(int(rest) for rest in process.stdout if rest.endswith(b"\n"))]
    with closing(Outbox(path, clock=lambda: 0)) as outbox:
        assert outbox.set_aside is None
        kept = [item.id for item in outbox.pending(1_000_000)]
        assert kept[: told[-1] + 1] == [f"id-{n}" for n in range(told[-1] + 1)]


def test_a_locked_file_is_a_storage_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.link.sqlite._BUSY_TIMEOUT_S", 0.05)
    with closing(Outbox(path, clock=lambda: 0)) as outbox, closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked"):
            outbox.put(DRIFT, "id", b"x")
        other.rollback()
        assert outbox.put(DRIFT, "id", b"x")


def test_a_clock_is_asked_once_for_each_new_item(path: Path) -> None:
    ticks = count(1)
    with closing(Outbox(path, clock=lambda: float(next(ticks)))) as outbox:
        outbox.put(DEMONSTRATION, "a", b"x")
        outbox.put(DEMONSTRATION, "a", b"x")
        outbox.put(DEMONSTRATION, "b", b"x")
        outbox.reject("a", "r")
        outbox.reject("b", "r")
        assert [item.created for item in outbox.rejected(9)] == [1.0, 2.0]
