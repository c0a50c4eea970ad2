"""Renewal: in time, without a restart, and only for who is still in force."""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from edge.identity.files import load_identity, request
from edge.identity.keys import new_key
from edge.identity.metrics import CertificateMetrics
from edge.identity.renew import Renewal, Renewer, channel_credentials, due_at
from protos.errors import RefusedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge.identity.files import Identity
    from tests.identity.identity_cloud import Clock, Cloud, timestamp_of
else:
    from identity_cloud import Clock, Cloud, timestamp_of

Eventually = Callable[[Callable[[], object]], None]


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(tmp_path / "cloud") as running:
        yield running


@given(begin=st.floats(0, 2e9), life=st.floats(60, 1e9), seed=st.integers(0, 2**32 - 1))
def test_it_is_due_when_there_is_time_left_to_try_again(
    begin: float, life: float, seed: int
) -> None:
    due = due_at(begin, begin + life, random=Random(seed))
    assert begin + life * 0.66 <= due <= begin + life * 0.72


def renewal(
    cloud: Cloud, identity: Identity, clock: Clock, renewed: Callable[[Identity], None]
) -> Renewal:
    return Renewal(
        identity,
        renewer=Renewer(cloud.grpc),
        renewed=renewed,
        clock=clock,
        random=Random(0),
        metrics=CertificateMetrics(CollectorRegistry()),
        look_s=0.05,
    )


def test_a_certificate_is_renewed_before_it_ends_and_connections_follow(
    cloud: Cloud, eventually: Eventually
) -> None:
    cloud.publish()
    identity = cloud.enrolled()
    transport = cloud.transport(identity)
    ended = threading.Event()

    def watch() -> None:
        try:
            list(transport.watch(student="aa" * 32, release=0))
        except UnavailableError:
            ended.set()

    threading.Thread(target=watch, daemon=True).start()
    eventually(
        lambda: cloud.metrics.get_sample_value("anabranch_watch_streams", {"channel": "home"})
    )
    running = renewal(
        cloud,
        identity,
        cloud.clock,
        lambda new: transport.reconnect(channel_credentials(new)),
    )
    running.start()
    assert not ended.wait(0.3)
    cloud.clock.ahead = 3600 * 0.8
    eventually(ended.is_set)  # the stream was made with the old certificate
    running.stop()
    new = load_identity(identity.folder)
    assert new.certificate.serial_number != identity.certificate.serial_number
    assert new.not_after > identity.not_after
    assert new.key.public_key() == identity.key.public_key()
    assert timestamp_of(transport)
    cloud.clock.ahead = 3600 * 1.3  # the old one would have expired
    assert timestamp_of(transport)
    assert cloud.requests("renewed") == 1
    transport.close()


def test_who_asks_too_early_or_twice_gets_what_there_is(cloud: Cloud) -> None:
    identity = cloud.enrolled()
    early = Renewer(cloud.grpc).renew(identity)
    assert early == identity
    cloud.clock.ahead = 3600 * 0.8
    late = Renewer(cloud.grpc).renew(identity)
    assert late != identity
    assert Renewer(cloud.grpc).renew(identity) == late  # the answer was lost on its way
    assert (cloud.requests("renewed"), cloud.requests("repeated")) == (1, 2)


def test_a_revoked_device_gets_no_other_certificate(cloud: Cloud, eventually: Eventually) -> None:
    identity = cloud.enrolled()
    cloud.registry.revoke("lamp-1", reason="stolen")
    cloud.clock.ahead = 3600 * 0.8
    with pytest.raises(RefusedError, match="not in force"):
        Renewer(cloud.grpc).renew(identity)
    running = renewal(cloud, identity, cloud.clock, lambda _: None)
    running.start()
    eventually(lambda: cloud.requests("refused") >= 2)
    running.stop()
    assert load_identity(identity.folder) == identity


def test_a_renewal_is_for_the_same_key_and_device(cloud: Cloud) -> None:
    identity = cloud.enrolled()
    serial = identity.certificate.serial_number
    cloud.clock.ahead = 3600 * 0.8
    with pytest.raises(RefusedError, match="key of the certificate"):
        cloud.registry.renew("lamp-1", serial, request(new_key(), device="lamp-1"))
    with pytest.raises(RefusedError, match="'lamp-2'"):
        cloud.registry.renew("lamp-1", serial, request(identity.key, device="lamp-2"))


def test_a_cloud_that_is_away_is_asked_again(cloud: Cloud, eventually: Eventually) -> None:
    identity = cloud.enrolled()
    metrics = CertificateMetrics(CollectorRegistry())
    clock = Clock()
    running = Renewal(
        identity,
        renewer=Renewer("127.0.0.1:1"),
        renewed=lambda _: None,
        clock=clock,
        random=Random(0),
        metrics=metrics,
        look_s=0.05,
    )
    running.start()
    clock.ahead = 3600 * 0.8
    eventually(lambda: metrics.failed._value.get() == 1)
    running.stop()
    assert load_identity(identity.folder) == identity


def test_a_server_s_certificate_is_renewed_without_a_restart(cloud: Cloud) -> None:
    import socket
    import ssl

    def shown() -> int:
        from cryptography import x509

        # This machine's clock is not the cloud's, so the certificate is checked below.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        host, _, port = cloud.enrolment.rpartition(":")
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port)), timeout=20) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as tls,
        ):
            der = tls.getpeercert(binary_form=True)
        assert der is not None
        certificate = x509.load_der_x509_certificate(der)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(cloud.ca))
        return certificate.serial_number

    first = shown()
    assert shown() == first
    cloud.clock.ahead = 70 * 86400  # of ninety days
    second = shown()
    assert second != first
    assert shown() == second
