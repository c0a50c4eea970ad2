"""The fleet service over mutual TLS: who calls is who the certificate says, as long as it holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import pytest

from cloud.identity.access import FleetLimits
from cloud.identity.authority import open_authority
from cloud.quota import Limit
from edge.identity.enroll import enroll
from edge.identity.files import load_identity, pending_key, store_identity
from edge.identity.renew import channel_credentials
from edge.update.grpc_transport import GrpcTransport
from protos.errors import UnavailableError
from protos.v1 import fleet_pb2, fleet_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge.identity.files import Identity
    from tests.identity.identity_cloud import BIG, STUDENT, Cloud, timestamp_of
else:
    from identity_cloud import BIG, STUDENT, Cloud, timestamp_of

Eventually = Callable[[Callable[[], object]], None]


class Watch:
    """A watch stream in a thread."""

    def __init__(self, transport: GrpcTransport) -> None:
        self.targets: list[int] = []
        self.error: Exception | None = None
        self._transport = transport
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for target in self._transport.watch(student=STUDENT, release=0):
                self.targets.append(target)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(tmp_path / "cloud") as running:
        yield running


@pytest.fixture
def lamp(cloud: Cloud) -> Iterator[GrpcTransport]:
    cloud.publish()
    transport = cloud.transport(cloud.enrolled())
    yield transport
    transport.close()


def code_of(
    cloud: Cloud, identity: Identity, call: Callable[[fleet_pb2_grpc.FleetStub], object]
) -> tuple[grpc.StatusCode, str]:
    """What becomes of any message that this identity may send."""
    with (
        grpc.secure_channel(cloud.grpc, channel_credentials(identity)) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        call(fleet_pb2_grpc.FleetStub(channel))
    return caught.value.code(), caught.value.details() or ""


def test_a_device_with_its_certificate_can_do_all_that_a_device_does(lamp: GrpcTransport) -> None:
    assert next(iter(lamp.watch(student=STUDENT, release=0))) == 1
    assert timestamp_of(lamp)
    lamp.report(
        fleet_pb2.UpdateReport(
            release=1, state=fleet_pb2.UPDATE_STATE_COMMITTED, student=STUDENT, sequence=1
        )
    )


@pytest.mark.parametrize("device", ["lamp-2", "", "@cloud"])
def test_a_device_speaks_for_no_other(cloud: Cloud, lamp: GrpcTransport, device: str) -> None:
    assert timestamp_of(lamp)
    cloud.enrolled("lamp-2")
    identity = load_identity(cloud.folder / "devices" / "lamp-1")
    report = fleet_pb2.UpdateReport(
        channel="home",
        device=device,
        release=1,
        state=fleet_pb2.UPDATE_STATE_FAILED,
        student=STUDENT,
        sequence=1,
    )
    code, details = code_of(cloud, identity, lambda stub: stub.Report(report, timeout=20))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "the certificate 'lamp-1'" in details
    assert cloud.refused("identity") == 1
    if device == "lamp-2":
        watch = fleet_pb2.WatchRequest(channel="home", device=device, student=STUDENT)
        code, _ = code_of(cloud, identity, lambda stub: list(stub.Watch(watch, timeout=20)))
        assert code is grpc.StatusCode.PERMISSION_DENIED


def test_a_device_reads_its_own_channel_only(cloud: Cloud, lamp: GrpcTransport) -> None:
    cloud.publish("office")
    other = cloud.transport(cloud.enrolled("desk", channel="office"), channel="office")
    stranger = cloud.transport(load_identity(cloud.folder / "devices" / "lamp-1"), channel="office")
    try:
        assert timestamp_of(other)
        assert timestamp_of(lamp)
        with pytest.raises(UnavailableError, match="belongs to channel home, not office"):
            timestamp_of(stranger)
    finally:
        other.close()
        stranger.close()


def test_without_a_certificate_nobody_gets_in(cloud: Cloud) -> None:
    cloud.publish()
    for credentials in (grpc.ssl_channel_credentials(root_certificates=cloud.ca), None):
        transport = GrpcTransport(
            address=cloud.grpc, channel="home", device="lamp-1", credentials=credentials
        )
        with pytest.raises(UnavailableError, match="UNAVAILABLE"):
            timestamp_of(transport)
        transport.close()


def test_a_certificate_of_another_authority_does_not_get_in(cloud: Cloud, tmp_path: Path) -> None:
    cloud.publish()
    cloud.enrolled()
    folder = tmp_path / "forged"
    key = pending_key(folder)
    authority = open_authority(tmp_path / "other", now=cloud.clock())
    from cryptography.hazmat.primitives.serialization import Encoding

    forged = authority.device("lamp-1", key.public_key(), now=cloud.clock(), life_s=60)
    identity = store_identity(
        folder,
        key=key,
        certificate=forged.public_bytes(Encoding.DER),
        authorities=authority.pem,
    )
    transport = GrpcTransport(
        address=cloud.grpc,
        channel="home",
        device="lamp-1",
        credentials=grpc.ssl_channel_credentials(
            root_certificates=cloud.ca,
            private_key=identity.key_pem,
            certificate_chain=identity.certificate_pem,
        ),
    )
    with pytest.raises(UnavailableError, match="UNAVAILABLE"):
        timestamp_of(transport)
    transport.close()


def test_a_certificate_that_is_not_on_the_register_does_not_get_in(
    cloud: Cloud, tmp_path: Path
) -> None:
    """The authority's key was used elsewhere, or the register was restored from a backup."""
    cloud.publish()
    cloud.enrolled()
    folder = tmp_path / "unlisted"
    key = pending_key(folder)
    authority = open_authority(cloud.folder / "identity", now=cloud.clock())
    from cryptography.hazmat.primitives.serialization import Encoding

    signed = authority.device("lamp-1", key.public_key(), now=cloud.clock(), life_s=60)
    identity = store_identity(
        folder,
        key=key,
        certificate=signed.public_bytes(Encoding.DER),
        authorities=authority.pem,
    )
    transport = cloud.transport(identity)
    with pytest.raises(UnavailableError, match="not on the register"):
        timestamp_of(transport)
    transport.close()


def test_the_cloud_s_own_certificate_is_no_device(cloud: Cloud) -> None:
    cloud.publish()
    cloud.security.broker_context()
    pair = (cloud.folder / "identity" / "cloud.pem").read_bytes()
    end = b"-----END PRIVATE KEY-----\n"
    key, certificate = pair.split(end)
    transport = GrpcTransport(
        address=cloud.grpc,
        channel="home",
        device="lamp-1",
        credentials=grpc.ssl_channel_credentials(cloud.ca, key + end, certificate),
    )
    with pytest.raises(UnavailableError, match="is no device"):
        timestamp_of(transport)
    transport.close()


def test_a_revocation_ends_an_open_stream_and_says_why(
    cloud: Cloud, lamp: GrpcTransport, eventually: Eventually
) -> None:
    other = cloud.transport(cloud.enrolled("lamp-2"))
    streams = [Watch(lamp), Watch(other)]
    eventually(lambda: all(s.targets for s in streams))
    cloud.registry.revoke("lamp-1", reason="stolen from the hall")
    eventually(lambda: streams[0].ended)
    assert "was revoked (stolen from the hall)" in str(streams[0].error)
    assert isinstance(streams[0].error, UnavailableError)  # it goes on asking
    with pytest.raises(UnavailableError, match="stolen from the hall"):
        timestamp_of(lamp)
    assert not streams[1].ended
    assert timestamp_of(other)
    assert cloud.refused("certificate") >= 2
    other.close()


def test_a_revocation_by_another_process_counts_as_well(
    cloud: Cloud, lamp: GrpcTransport, eventually: Eventually
) -> None:
    import subprocess
    import sys

    stream = Watch(lamp)
    eventually(lambda: stream.targets)
    command = [sys.executable, "-m", "cloud.cli", "device", "revoke", "lamp-1"]
    subprocess.run([*command, "--state", cloud.folder, "--reason", "sold"], check=True)
    eventually(lambda: stream.ended)
    assert "sold" in str(stream.error)


def test_a_certificate_that_expires_ends_an_open_stream(
    cloud: Cloud, lamp: GrpcTransport, eventually: Eventually
) -> None:
    stream = Watch(lamp)
    eventually(lambda: stream.targets)
    cloud.clock.ahead = 3601
    eventually(lambda: stream.ended)
    assert "has expired" in str(stream.error)


def test_who_enrols_again_leaves_nothing_to_who_took_the_old_key(
    cloud: Cloud, lamp: GrpcTransport, eventually: Eventually
) -> None:
    stolen = Watch(lamp)
    eventually(lambda: stolen.targets)
    token = cloud.registry.invite("lamp-1")
    identity, _ = enroll(
        cloud.folder / "devices" / "lamp-1",
        cloud=cloud.enrolment,
        token=token,
        authorities=cloud.ca,
        again=True,
    )
    eventually(lambda: stolen.ended)
    assert "superseded" in str(stolen.error)
    fresh = cloud.transport(identity)
    assert timestamp_of(fresh)
    fresh.close()


def test_a_revoked_key_is_not_certified_again(cloud: Cloud) -> None:
    from edge.identity.files import request
    from protos.errors import RefusedError

    identity = cloud.enrolled()
    cloud.registry.revoke("lamp-1", reason="stolen")
    token = cloud.registry.invite("lamp-1")
    with pytest.raises(RefusedError, match="this key was revoked"):
        cloud.registry.enroll(token, request(identity.key, device=None))


def test_a_revocation_takes_unused_tokens_along(cloud: Cloud) -> None:
    from edge.identity.files import request
    from edge.identity.keys import new_key
    from protos.errors import RefusedError

    token = cloud.token()
    cloud.registry.revoke("lamp-1", reason="lost before it was installed")
    with pytest.raises(RefusedError, match="not known"):
        cloud.registry.enroll(token, request(new_key(), device=None))


def test_a_device_has_so_many_streams_and_no_more(tmp_path: Path, eventually: Eventually) -> None:
    with Cloud(tmp_path / "cloud", limits=FleetLimits(watches=2)) as cloud:
        cloud.publish()
        identity = cloud.enrolled()
        transports = [cloud.transport(identity) for _ in range(3)]
        streams = [Watch(t) for t in transports[:2]]
        eventually(lambda: all(s.targets for s in streams))
        third = Watch(transports[2])
        eventually(lambda: third.ended)
        assert "has 2 watch streams open already" in str(third.error)
        assert cloud.refused("streams") == 1
        other = cloud.transport(cloud.enrolled("lamp-2"))
        assert next(iter(other.watch(student=STUDENT, release=0))) in (0, 1)
        transports[0].close()
        eventually(lambda: cloud.security.access.open["lamp-1", "watch streams"] == 1)
        again = Watch(transports[2])
        eventually(lambda: again.targets)
        for transport in (*transports, other):
            transport.close()


def test_a_device_reads_so_many_bytes_and_then_waits(tmp_path: Path) -> None:
    limits = FleetLimits(bytes=Limit(BIG / 2, 100.0))
    with Cloud(tmp_path / "cloud", limits=limits) as cloud:
        release = cloud.publish()
        weights = next(f for f in release.manifest.files if f.name == "weights.bin")
        greedy = cloud.transport(cloud.enrolled())
        other = cloud.transport(cloud.enrolled("lamp-2"))
        assert sum(len(p.data) for p in greedy.read(weights.sha256, 0)) == BIG
        with pytest.raises(UnavailableError, match=r"has read 0 MiB within a day.*may go on in"):
            list(greedy.read(weights.sha256, 0))
        assert cloud.refused("bytes") == 1
        assert sum(len(p.data) for p in other.read(weights.sha256, 0)) == BIG
        greedy.close()
        other.close()


def test_the_register_tells_what_became_of_each_device(cloud: Cloud) -> None:
    cloud.registry.add("added", channel="home")
    cloud.token("invited")
    cloud.enrolled("enrolled")
    cloud.enrolled("revoked")
    cloud.registry.revoke("revoked", reason="sold")
    assert {d.device: d.state for d in cloud.registry.devices()} == {
        name: name for name in ("added", "invited", "enrolled", "revoked")
    }
    assert next(d.reason for d in cloud.registry.devices() if d.device == "revoked") == "sold"
    cloud.security.keeper.refresh()
    assert cloud.metrics.get_sample_value("anabranch_devices_certified") == 1
    cloud.clock.ahead = 3601
    assert {d.state for d in cloud.registry.devices()} == {"added", "expired", "revoked"}
