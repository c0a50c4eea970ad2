"""Enrolment over real TLS: tokens, requests, kills in between, impostors."""

from __future__ import annotations

import contextlib
import re
import signal
import ssl
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from cloud.identity.authority import open_authority
from edge.identity.enroll import enroll
from edge.identity.files import (
    IDENTITY,
    PENDING,
    load_identity,
    pending_key,
    request,
    store_identity,
)
from edge.identity.keys import new_key
from protos.errors import IntegrityError, InvalidInputError, RefusedError, UnavailableError
from protos.v1 import identity_pb2, identity_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.identity.identity_cloud import Cloud, timestamp_of
else:
    from identity_cloud import Cloud, timestamp_of


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(tmp_path / "cloud") as running:
        yield running


WRONG = "guess"


def ask(cloud: Cloud, token: str, csr: bytes) -> identity_pb2.CertificateReply:
    """Call the service as any client may."""
    credentials = grpc.ssl_channel_credentials(root_certificates=cloud.ca)
    with grpc.secure_channel(cloud.enrolment, credentials) as channel:
        message = identity_pb2.EnrollRequest(token=token, csr=csr)
        return identity_pb2_grpc.EnrolmentStub(channel).Enroll(message, timeout=20)


def refusal(cloud: Cloud, token: str, csr: bytes) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        ask(cloud, token, csr)
    return caught.value.code(), caught.value.details() or ""


def test_a_device_gets_a_certificate_for_the_name_of_its_token(
    cloud: Cloud, tmp_path: Path
) -> None:
    identity, channel = enroll(
        tmp_path / "id", cloud=cloud.enrolment, token=cloud.token(), authorities=cloud.ca
    )
    assert (identity.device, channel) == ("lamp-1", "home")
    assert load_identity(tmp_path / "id") == identity
    assert stat.S_IMODE((tmp_path / "id" / IDENTITY).stat().st_mode) == 0o600
    assert not (tmp_path / "id" / PENDING).exists()
    assert cloud.requests("enrolled") == 1


def test_the_private_key_never_leaves_the_device(cloud: Cloud) -> None:
    identity = cloud.enrolled()
    secret = identity.key.private_numbers().private_value.to_bytes(32, "big")
    kept = b"".join(p.read_bytes() for p in cloud.folder.glob("*.sqlite*"))
    assert identity.certificate.serial_number.to_bytes(20, "big").hex().encode() in kept
    assert secret not in kept


def test_the_cloud_keeps_no_token_that_could_be_used(cloud: Cloud) -> None:
    token = cloud.token()
    kept = b"".join(p.read_bytes() for p in cloud.folder.glob("*.sqlite*"))
    assert b"lamp-1" in kept
    assert token.encode() not in kept


def test_a_token_is_good_for_one_key(cloud: Cloud) -> None:
    token = cloud.token()
    ask(cloud, token, request(new_key(), device=None))
    code, details = refusal(cloud, token, request(new_key(), device=None))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "used already, by another key" in details
    assert cloud.requests("refused") == 1


def test_the_same_key_gets_the_same_certificate_again(cloud: Cloud) -> None:
    token, csr = cloud.token(), request(new_key(), device=None)
    first = ask(cloud, token, csr)
    cloud.clock.ahead = 120  # the token has expired since, but was used in time
    assert ask(cloud, token, csr) == first
    assert cloud.requests("repeated") == 1


def test_a_token_that_has_expired_is_refused(cloud: Cloud) -> None:
    token = cloud.token(life_s=60)
    cloud.clock.ahead = 61
    code, details = refusal(cloud, token, request(new_key(), device=None))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "expired" in details


def test_a_token_that_was_never_given_is_refused(cloud: Cloud) -> None:
    cloud.token()
    code, details = refusal(cloud, "guess", request(new_key(), device=None))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "not known" in details


def test_a_request_for_another_device_is_refused_and_burns_nothing(cloud: Cloud) -> None:
    token = cloud.token("lamp-1")
    cloud.token("lamp-2")
    code, details = refusal(cloud, token, request(new_key(), device="lamp-2"))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "'lamp-2'" in details
    assert ask(cloud, token, request(new_key(), device="lamp-1")).channel == "home"


def of_another_kind() -> dict[str, bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    good = request(new_key(), device=None)
    return {
        "ed25519": builder.sign(ed25519.Ed25519PrivateKey.generate(), None).public_bytes(
            Encoding.DER
        ),
        "P-384": builder.sign(ec.generate_private_key(ec.SECP384R1()), SHA256()).public_bytes(
            Encoding.DER
        ),
        "garbage": b"garbage",
        "empty": b"",
        "unproven": good[:-4] + bytes(b ^ 1 for b in good[-4:]),
        "huge": good + bytes(10_000),
    }


@pytest.mark.parametrize("kind", of_another_kind())
def test_a_request_that_is_wrong_is_refused_and_burns_nothing(cloud: Cloud, kind: str) -> None:
    token = cloud.token()
    code, _ = refusal(cloud, token, of_another_kind()[kind])
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert ask(cloud, token, request(new_key(), device=None)).certificate


def test_the_answer_may_be_lost_on_its_way(cloud: Cloud, tmp_path: Path) -> None:
    """The cloud has signed, and the power goes before the device has stored it."""
    token, folder = cloud.token(), tmp_path / "id"
    given = ask(cloud, token, request(pending_key(folder), device=None))
    identity, _ = enroll(folder, cloud=cloud.enrolment, token=token, authorities=cloud.ca)
    from cryptography.hazmat.primitives.serialization import Encoding

    assert identity.certificate.public_bytes(Encoding.DER) == given.certificate


def test_a_kill_between_storing_and_tidying_up_is_mended_by_trying_again(
    cloud: Cloud, tmp_path: Path
) -> None:
    token, folder = cloud.token(), tmp_path / "id"
    key = pending_key(folder)
    reply = ask(cloud, token, request(key, device=None))
    store_identity(folder, key=key, certificate=reply.certificate, authorities=cloud.ca)
    assert (folder / PENDING).exists()
    enroll(folder, cloud=cloud.enrolment, token=token, authorities=cloud.ca)
    assert not (folder / PENDING).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from edge.delta import files
from edge.identity.enroll import enroll
folder, cloud, token, ca, kill_at = sys.argv[1:]
writes = 0
replace, unlink = os.replace, Path.unlink
def dying(do):
    def step(*arguments, **options):
        global writes
        writes += 1
        if writes == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return do(*arguments, **options)
    return step
os.replace = dying(replace)
Path.unlink = dying(unlink)
enroll(Path(folder), cloud=cloud, token=token, authorities=Path(ca).read_bytes())
print(f"done after {writes} steps")
"""


def test_a_kill_at_any_write_burns_no_token(cloud: Cloud, tmp_path: Path) -> None:
    ca = cloud.folder / "identity" / "ca.pem"
    done = ""
    kills = 0
    while not done:
        token, folder = cloud.token(), tmp_path / f"id-{kills}"
        command = [sys.executable, "-c", KILLED, str(folder), cloud.enrolment, token, str(ca)]
        ran = subprocess.run(
            [*command, str(kills + 1)], capture_output=True, text=True, check=False
        )
        done = ran.stdout
        if ran.returncode == 0:
            break
        assert ran.returncode == -signal.SIGKILL, ran.stderr
        kills += 1
        identity, _ = enroll(folder, cloud=cloud.enrolment, token=token, authorities=cloud.ca)
        assert identity.device == "lamp-1"
        assert load_identity(folder) == identity
    assert re.search(r"done after \d+ steps", done)
    assert kills >= 4  # pending key, authorities, identity, tidying up


def test_a_cloud_of_another_authority_is_not_believed(cloud: Cloud, tmp_path: Path) -> None:
    other = open_authority(tmp_path / "other", now=cloud.clock()).pem
    with pytest.raises(UnavailableError, match=r"ca\.pem is not of its authority"):
        enroll(tmp_path / "id", cloud=cloud.enrolment, token=cloud.token(), authorities=other)
    assert cloud.requests("enrolled") == 0


def test_a_device_is_not_enrolled_twice_unless_told(cloud: Cloud, tmp_path: Path) -> None:
    folder = tmp_path / "id"
    first, _ = enroll(folder, cloud=cloud.enrolment, token=cloud.token(), authorities=cloud.ca)
    with pytest.raises(InvalidInputError, match="--again"):
        enroll(folder, cloud=cloud.enrolment, token=cloud.token(), authorities=cloud.ca)
    assert load_identity(folder) == first
    with pytest.raises(RefusedError):  # a wrong token costs nothing
        enroll(folder, cloud=cloud.enrolment, token=WRONG, authorities=cloud.ca, again=True)
    assert load_identity(folder) == first
    second, _ = enroll(
        folder, cloud=cloud.enrolment, token=cloud.token(), authorities=cloud.ca, again=True
    )
    assert second.key.public_key() != first.key.public_key()
    assert load_identity(folder) == second


def test_who_says_which_device_it_is_must_be_right(cloud: Cloud, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="'lamp-2'"):
        enroll(
            tmp_path / "id",
            cloud=cloud.enrolment,
            token=cloud.token("lamp-1"),
            authorities=cloud.ca,
            device="lamp-2",
        )


def test_a_certificate_for_another_key_is_not_stored(cloud: Cloud, tmp_path: Path) -> None:
    reply = ask(cloud, cloud.token(), request(new_key(), device=None))
    folder = tmp_path / "id"
    with pytest.raises(IntegrityError, match="another key"):
        store_identity(
            folder,
            key=pending_key(folder),
            certificate=reply.certificate,
            authorities=cloud.ca,
        )
    assert not (folder / IDENTITY).exists()


def test_an_identity_that_others_may_read_is_refused(cloud: Cloud) -> None:
    identity = cloud.enrolled()
    identity.file.chmod(0o644)
    with pytest.raises(InvalidInputError, match="chmod 600"):
        load_identity(identity.folder)


def test_a_damaged_identity_says_what_to_do(cloud: Cloud) -> None:
    identity = cloud.enrolled()
    identity.file.write_bytes(identity.file.read_bytes()[:-200])
    with pytest.raises(IntegrityError, match="enrol this device again"):
        load_identity(identity.folder)


def test_the_enrolment_port_serves_nothing_else(cloud: Cloud) -> None:
    cloud.publish()
    identity = cloud.enrolled()
    transport = cloud.transport(identity)
    from edge.update.grpc_transport import GrpcTransport

    without = GrpcTransport(
        address=cloud.enrolment,
        channel="home",
        device="lamp-1",
        credentials=grpc.ssl_channel_credentials(root_certificates=cloud.ca),
    )
    try:
        assert timestamp_of(transport)
        with pytest.raises(UnavailableError, match="UNIMPLEMENTED"):
            timestamp_of(without)
    finally:
        transport.close()
        without.close()


def test_a_device_cannot_play_the_cloud(cloud: Cloud) -> None:
    """Its certificate is by the same authority, but not for servers."""
    identity = cloud.enrolled("127.0.0.1")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(identity.file)
    client = ssl.create_default_context(cadata=cloud.ca.decode())
    client.check_hostname = False  # even for who does not look at the name
    here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(here, there, server_side=False)
    two = server.wrap_bio(there, here, server_side=True)

    def shake_hands() -> None:
        for _ in range(10):
            for side in (one, two):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()

    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands()
