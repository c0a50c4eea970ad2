"""What one device may give: the buckets, and what a real device does when it is over its limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from cloud.evidence.ingest import Ingest
from cloud.evidence.metrics import IngestMetrics
from cloud.evidence.quota import EvidenceLimits, EvidenceQuota, Sender
from cloud.quota import Bucket, Buckets, Limit, wait_s
from edge.link.address import parse_address
from edge.link.metrics import LinkMetrics
from edge.link.outbox import DEMONSTRATION, Outbox
from edge.link.uplink import InService, Uplink
from protos.errors import InvalidInputError, RefusedError
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from cloud.evidence.store import EvidenceStore

Eventually = Callable[[Callable[[], object]], None]
Demonstrate = Callable[..., device_pb2.Demonstration]
LIMITS = st.builds(Limit, st.floats(1, 1e6), st.floats(1e-3, 1e3))


@given(limit=LIMITS, asks=st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 50)), max_size=60))
def test_no_more_passes_than_a_bucket_and_what_came_back(
    limit: Limit, asks: list[tuple[float, float]]
) -> None:
    buckets = Buckets[str](limit)
    now = passed = largest = 0.0
    for pause, cost in asks:
        now += pause
        if buckets.wait_s("lamp", cost, now=now) == 0:
            buckets.take("lamp", cost, now=now)
            passed += cost
            largest = max(largest, cost)
    # What costs more than a whole bucket passes when it is full.
    over = max(0.0, largest - limit.capacity)
    assert passed <= (limit.capacity + limit.per_s * now + over) * (1 + 1e-9)


@given(limit=LIMITS, left=st.floats(-1e6, 1e6), cost=st.floats(0.1, 1e7))
def test_who_waits_as_long_as_told_is_let_through(limit: Limit, left: float, cost: float) -> None:
    bucket = Bucket(min(left, limit.capacity), 0.0)
    wait = wait_s(bucket, limit, cost)
    assert wait_s(bucket.filled(limit, wait * (1 + 1e-9) + 1e-6), limit, cost) == 0


def test_devices_have_buckets_of_their_own() -> None:
    buckets = Buckets[str](Limit(1, 1))
    buckets.take("lamp-1", 1, now=0)
    assert buckets.wait_s("lamp-1", 1, now=0) > 0
    assert buckets.wait_s("lamp-2", 1, now=0) == 0


def test_full_buckets_are_forgotten_and_others_kept() -> None:
    buckets = Buckets[int](Limit(1, 1))
    for device in range(10_001):
        buckets.take(device, 1, now=0)
    buckets.take(-1, 1, now=10)
    assert len(buckets._buckets) == 1
    assert buckets.wait_s(-1, 1, now=10) > 0


def test_what_is_given_back_can_be_used_again() -> None:
    quota = EvidenceQuota(EvidenceLimits(messages=Limit(1, 1e-3), bytes=Limit(100, 1e-3)))
    lamp = Sender("home", "lamp-1")
    assert quota.take(lamp, "a", 100, now=0) is None
    refused = quota.take(lamp, "b", 100, now=0)
    assert refused is not None
    assert refused.retry_after_s > 0
    quota.give_back(lamp, 100, now=0)
    assert quota.take(lamp, "b", 100, now=0) is None


def test_bytes_have_a_limit_of_their_own() -> None:
    quota = EvidenceQuota(EvidenceLimits.of(burst=1000, per_minute=60, mb_per_day=1))
    lamp = Sender("home", "lamp-1")
    taken = 0
    while (refused := quota.take(lamp, "x", 64 * 1024, now=0)) is None:
        taken += 64 * 1024
    assert taken == 1024 * 1024
    assert "1.0 MiB a day" in refused.detail


@pytest.mark.parametrize("wrong", [{"burst": 0}, {"per_minute": 0}, {"mb_per_day": -1}])
def test_a_quota_that_lets_nothing_pass_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError):
        EvidenceLimits.of(**{"burst": 1, "per_minute": 1, "mb_per_day": 1, **wrong})


class Home:
    """One device's outbox and uplink, and the cloud's ingest."""

    def __init__(self, broker: str, store: EvidenceStore, folder: Path, **options: object) -> None:
        self.store = store
        self.registry = CollectorRegistry()
        self.ingest = Ingest(
            address=parse_address(broker),
            store=store,
            metrics=IngestMetrics(self.registry, channels=["quota"]),
            random=Random(),
            channel="quota",
            **options,  # type: ignore[arg-type] # limits or check_sender
        )
        self.outbox = Outbox(folder / "outbox.sqlite", clock=time.time)
        self.link = CollectorRegistry()
        self.uplink = Uplink(
            channel="quota",
            device="lamp-1",
            agent_version="0.1.0",
            address=parse_address(broker),
            outbox=self.outbox,
            in_service=lambda: InService("d" * 64, 0),
            metrics=LinkMetrics(self.link),
            clock=time.time,
            random=Random(0),
        )
        self.ingest.start()
        assert self.ingest.wait_connected(20)
        self.uplink.start()

    def say(self, message: device_pb2.Demonstration) -> None:
        self.outbox.put(DEMONSTRATION, message.id, message.SerializeToString())
        self.uplink.wake()

    def refused(self, reason: str) -> float:
        labels = {"channel": "quota", "reason": reason}
        return self.registry.get_sample_value("anabranch_messages_rejected_total", labels) or 0

    def close(self) -> None:
        self.uplink.stop(0.1)
        self.ingest.stop()
        self.outbox.close()


def test_over_the_limit_a_device_is_told_why_keeps_all_and_gives_it_in_time(
    broker: str,
    store: EvidenceStore,
    tmp_path: Path,
    demonstrate: Demonstrate,
    eventually: Eventually,
) -> None:
    limits = EvidenceLimits(messages=Limit(5, 1.5), bytes=Limit(1e6, 1e6))
    with closing(Home(broker, store, tmp_path, limits=limits)) as home:
        given = [demonstrate(channel="quota") for _ in range(8)]
        for message in given:
            home.say(message)
        eventually(lambda: home.uplink.held)
        assert "over its limit of 5 messages at once" in (home.uplink.held or "")
        assert home.refused("quota") >= 1
        assert (home.link.get_sample_value("anabranch_messages_put_off_total") or 0) >= 1
        assert home.outbox.counts().waiting >= 1
        assert home.outbox.counts().rejected == 0
        eventually(lambda: home.outbox.counts().waiting == 0)
        stored = {m.id for m in store.demonstrations("quota")}
        assert stored == {m.id for m in given}


def test_what_comes_again_costs_no_quota(
    broker: str,
    store: EvidenceStore,
    tmp_path: Path,
    demonstrate: Demonstrate,
    eventually: Eventually,
) -> None:
    limits = EvidenceLimits(messages=Limit(2, 1e-6), bytes=Limit(1e6, 1e6))
    first, second = demonstrate(channel="quota"), demonstrate(channel="quota")
    with closing(Home(broker, store, tmp_path, limits=limits)) as home:
        for _ in range(5):  # its acknowledgement was lost each time
            home.say(first)
            eventually(lambda: home.outbox.counts().waiting == 0)
        home.say(second)
        eventually(lambda: home.outbox.counts().waiting == 0)
        assert len(store.demonstrations("quota")) == 2
        home.say(demonstrate(channel="quota"))
        eventually(lambda: home.uplink.held)


def test_a_disk_that_fails_costs_no_quota(
    broker: str,
    store: EvidenceStore,
    tmp_path: Path,
    demonstrate: Demonstrate,
    eventually: Eventually,
    full_disk: Callable[[], AbstractContextManager[None]],
) -> None:
    limits = EvidenceLimits(messages=Limit(1, 1e-6), bytes=Limit(1e6, 1e6))
    with closing(Home(broker, store, tmp_path, limits=limits)) as home:
        message = demonstrate(channel="quota", answer="x" * 60_000)
        with full_disk():
            home.say(message)
            eventually(lambda: home.refused("storage"))
        eventually(lambda: home.outbox.counts().waiting == 0)
        assert store.demonstrations("quota") == [message]


def test_from_who_is_not_known_nothing_is_taken_and_nothing_is_lost(
    broker: str,
    store: EvidenceStore,
    tmp_path: Path,
    demonstrate: Demonstrate,
    eventually: Eventually,
) -> None:
    def check(channel: str, device: str) -> None:
        message = f"the certificate of {channel}/{device} was revoked (sold)"
        raise RefusedError(message)

    with closing(Home(broker, store, tmp_path, check_sender=check)) as home:
        home.say(demonstrate(channel="quota"))
        eventually(lambda: home.uplink.held)
        assert "was revoked (sold)" in (home.uplink.held or "")
        assert home.refused("identity") >= 2  # the birth as well
        assert home.outbox.counts().waiting == 1
        assert not store.demonstrations("quota")
        assert not store.devices("quota")
