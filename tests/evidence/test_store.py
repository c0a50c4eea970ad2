"""The evidence store adds, answers, and never changes what it holds."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import IntegrityError

from cloud.db import open_database, write
from cloud.evidence.store import STALE_AFTER_S, EvidenceStore, Outcome
from protos.errors import StorageError
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sqlalchemy import Engine

    Demonstrate = Callable[..., device_pb2.Demonstration]
    ReportDrift = Callable[..., device_pb2.DriftReport]


def test_new_and_repeated_evidence_are_both_stored(
    store: EvidenceStore, demonstrate: Demonstrate
) -> None:
    one, two = demonstrate(), demonstrate()
    receipts = store.add([one, two, one])
    assert [r.outcome for r in receipts] == [Outcome.NEW, Outcome.NEW, Outcome.DUPLICATE]
    assert [r.outcome for r in store.add([two])] == [Outcome.DUPLICATE]
    acks = [r.ack() for r in receipts]
    assert {a.status for a in acks} == {device_pb2.ACK_STATUS_STORED}
    assert [a.id for a in acks] == [one.id, two.id, one.id]
    assert store.demonstrations("home") == [one, two]
    assert store.add([]) == []


def test_an_id_used_again_for_other_content_is_rejected_and_the_first_stays(
    store: EvidenceStore, demonstrate: Demonstrate
) -> None:
    first = demonstrate()
    second = demonstrate(id=first.id, correction="another")
    store.add([first])
    (receipt,) = store.add([second])
    assert receipt.outcome is Outcome.REJECTED
    assert receipt.ack().status == device_pb2.ACK_STATUS_REJECTED
    assert "already belongs" in receipt.ack().reason
    assert store.demonstrations("home") == [first]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"id": "7"}, "not a UUIDv7"),
        ({"id": "01900000-0000-4000-8000-000000000000"}, "not a UUIDv7"),
        ({"messages": [device_pb2.ChatMessage(role="assistant", content="x")]}, "the user's"),
        ({"messages": [device_pb2.ChatMessage(role="user"), device_pb2.ChatMessage()]}, "user's"),
        ({"signals": device_pb2.Signals(surprise=float("nan"))}, "surprise is nan"),
        ({"created_ms": -1}, "has no time"),
        ({"channel": "../etc"}, "is not a name"),
    ],
)
def test_evidence_that_teaches_nothing_is_rejected_with_the_reason(
    store: EvidenceStore, demonstrate: Demonstrate, fields: dict[str, object], says: str
) -> None:
    good = demonstrate()
    receipts = store.add([demonstrate(**fields), good])
    assert [r.outcome for r in receipts] == [Outcome.REJECTED, Outcome.NEW]
    assert says in receipts[0].reason
    assert store.demonstrations("home") == [good]


@pytest.mark.parametrize("field", ["correction", "source", "messages", "created_ms"])
def test_evidence_with_a_missing_field_is_rejected(
    store: EvidenceStore, demonstrate: Demonstrate, field: str
) -> None:
    message = demonstrate()
    message.ClearField(field)  # type: ignore[arg-type] # one of the names above
    assert store.add([message])[0].outcome is Outcome.REJECTED


def test_unknown_roles_are_rejected(store: EvidenceStore, demonstrate: Demonstrate) -> None:
    message = demonstrate()
    message.messages.insert(0, device_pb2.ChatMessage(role="wizard", content="x"))
    assert "wizard" in store.add([message])[0].reason


def test_demonstrations_come_in_the_order_they_were_made(
    store: EvidenceStore, demonstrate: Demonstrate
) -> None:
    late, early, other = (
        demonstrate(created_ms=200),
        demonstrate(created_ms=100),
        demonstrate(channel="office"),
    )
    store.add([late, early, other])
    assert store.demonstrations("home") == [early, late]
    assert store.demonstrations("home", limit=1) == [late]
    assert store.demonstrations("home", exclude=[late.id, "x"]) == [early]
    assert store.demonstrations("home", only=[late.id, other.id]) == [late]
    assert store.demonstrations("home", only=[]) == []
    assert store.demonstrations("nowhere") == []


def test_long_lists_of_ids_are_no_trouble(store: EvidenceStore, demonstrate: Demonstrate) -> None:
    kept = demonstrate()
    store.add([kept])
    many = [f"id-{n}" for n in range(40_000)]
    assert store.demonstrations("home", exclude=many) == [kept]
    assert store.demonstrations("home", only=[*many, kept.id]) == [kept]


def test_counts_are_per_device(store: EvidenceStore, demonstrate: Demonstrate) -> None:
    store.add([demonstrate(), demonstrate(), demonstrate(device="lamp-2")])
    assert store.counts("home") == {"lamp-1": 2, "lamp-2": 1}
    assert store.counts("nowhere") == {}


def test_what_a_newer_agent_adds_to_a_message_is_kept(
    store: EvidenceStore, demonstrate: Demonstrate
) -> None:
    newer = device_pb2.Demonstration.FromString(
        demonstrate().SerializeToString() + b"\xfa\x3f\x05extra"  # field 1023
    )
    assert store.add([newer])[0].outcome is Outcome.NEW
    (stored,) = store.demonstrations("home")
    assert b"extra" in stored.SerializeToString()
    assert store.add([newer])[0].outcome is Outcome.DUPLICATE


@pytest.mark.parametrize("table", ["demonstrations", "drift_reports"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET payload = x''", "DELETE FROM {}"])
def test_the_database_itself_refuses_to_rewrite_evidence(
    engine: Engine,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    report_drift: ReportDrift,
    table: str,
    statement: str,
) -> None:
    demonstration, report = demonstrate(), report_drift()
    store.add([demonstration])
    store.add_drift([report])
    with pytest.raises(IntegrityError, match="append-only"), write(engine) as session:
        session.connection().exec_driver_sql(statement.format(table))
    assert store.demonstrations("home") == [demonstration]
    assert store.drift_reports("home") == [report]


def test_drift_reports_are_added_once_and_found_by_time(
    store: EvidenceStore, report_drift: ReportDrift
) -> None:
    old, new = report_drift(created_ms=100), report_drift(created_ms=200)
    assert [r.outcome for r in store.add_drift([new, old, new])] == [
        Outcome.NEW,
        Outcome.NEW,
        Outcome.DUPLICATE,
    ]
    assert store.drift_reports("home") == [old, new]
    assert store.drift_reports("home", since_ms=200) == [new]
    assert store.drift_reports("office") == []


def test_a_drift_report_without_sense_is_rejected(
    store: EvidenceStore, report_drift: ReportDrift
) -> None:
    kindless = report_drift()
    kindless.ClearField("kind")
    infinite = report_drift(signals=[device_pb2.SignalState(name="x", recent=float("inf"))])
    receipts = store.add_drift([kindless, infinite])
    assert [r.outcome for r in receipts] == [Outcome.REJECTED] * 2
    assert "no known kind" in receipts[0].reason
    assert "not a finite number" in receipts[1].reason


def birth(session: int, device: str = "lamp-1", release: int = 0) -> device_pb2.Birth:
    return device_pb2.Birth(
        channel="home", device=device, session=session, student="d" * 64, release=release
    )


def death(session: int, device: str = "lamp-1") -> device_pb2.Death:
    return device_pb2.Death(channel="home", device=device, session=session)


def test_births_and_deaths_tell_who_is_online(store: EvidenceStore) -> None:
    assert store.birth(birth(5))
    assert store.birth(birth(1, "lamp-2", release=4))
    assert store.death(death(1, "lamp-2"))
    one, two = store.devices("home")
    assert (one.device, one.online, one.session, one.died_ms) == ("lamp-1", True, 5, None)
    assert (two.device, two.online, two.release) == ("lamp-2", False, 4)
    assert two.died_ms is not None
    assert store.devices("office") == []


def test_news_of_an_older_session_is_ignored(store: EvidenceStore) -> None:
    store.birth(birth(5, release=2))
    assert not store.death(death(4)), "the will of a connection that was replaced"
    assert not store.birth(birth(4, release=1))
    assert not store.death(death(9, "never born"))
    (device,) = store.devices("home")
    assert (device.online, device.session, device.release) == (True, 5, 2)


def test_a_device_that_falls_silent_is_not_online_for_ever(
    store: EvidenceStore, clock: Callable[[], float]
) -> None:
    store.birth(birth(5))
    clock.now += STALE_AFTER_S + 1  # type: ignore[attr-defined] # the tests' clock
    assert not store.devices("home")[0].online
    store.birth(birth(5))
    assert store.devices("home")[0].online


def test_a_full_disk_is_a_clear_error_and_nothing_is_half_stored(
    store: EvidenceStore,
    demonstrate: Demonstrate,
    full_disk: Callable[[], AbstractContextManager[None]],
) -> None:
    before = demonstrate()
    store.add([before])
    more = [demonstrate(answer="x" * 10_000) for _ in range(20)]
    with full_disk():
        with pytest.raises(StorageError, match="full"):
            store.add(more)
        assert store.demonstrations("home") == [before]
    assert {r.outcome for r in store.add(more)} == {Outcome.NEW}


def test_stored_evidence_survives_sigkill(tmp_path: Path, demonstrate: Demonstrate) -> None:
    path, message = tmp_path / "killed.db", demonstrate()
    program = f"""
import os, pathlib, signal, time
from cloud.db import open_database
from cloud.evidence.store import EvidenceStore
from protos.v1 import device_pb2
store = EvidenceStore(open_database(pathlib.Path({str(path)!r})), clock=time.time)
store.add([device_pb2.Demonstration.FromString({message.SerializeToString()!r})])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    engine = open_database(path)
    assert EvidenceStore(engine, clock=lambda: 0).demonstrations("home") == [message]
    engine.dispose()


def test_evidence_and_its_guards_survive_a_damaged_file(
    tmp_path: Path, demonstrate: Demonstrate
) -> None:
    path = tmp_path / "damaged.db"
    engine = open_database(path)
    messages = [demonstrate(answer="x" * 400, created_ms=n + 1) for n in range(300)]
    EvidenceStore(engine, clock=lambda: 1).add(messages)
    engine.dispose()
    data = bytearray(path.read_bytes())
    middle = len(data) // 4096 // 2 * 4096
    data[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    engine = open_database(path)
    found = EvidenceStore(engine, clock=lambda: 1).demonstrations("home")
    assert len(found) > 200
    assert {m.id for m in found} <= {m.id for m in messages}
    with pytest.raises(IntegrityError, match="append-only"), write(engine) as session:
        session.connection().exec_driver_sql("DELETE FROM demonstrations")
    engine.dispose()
