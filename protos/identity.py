"""How a certificate says whose it is.

A device's name stands in its certificate's one URI among the subject alternative names, as a SPIFFE
ID: names of devices tell upper from lower case and may hold an underscore, which DNS names do not.
The common name repeats it for brokers that look at nothing else (Mosquitto does not).

Source: the SPIFFE standards "SPIFFE-ID" and "X509-SVID"; RFC 5280, section 4.2.1.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.x509 import (
    ExtensionNotFound,
    SubjectAlternativeName,
    UniformResourceIdentifier,
)

from protos.errors import InvalidInputError
from protos.topics import check_name

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, CertificateSigningRequest

_DEVICES: Final = "spiffe://anabranch/device/"
CLOUD_URI: Final = "spiffe://anabranch/cloud"
"""Who the cloud is to the broker."""
CLOUD_NAME: Final = "@cloud"
"""The same as a common name: no device can be called that."""


def device_uri(device: str) -> str:
    """The URI of a device.

    >>> device_uri("kitchen-1")
    'spiffe://anabranch/device/kitchen-1'
    """
    return _DEVICES + check_name(device, "device")


def device_of(certificate: Certificate | CertificateSigningRequest) -> str:
    """Whose certificate this is, or for whom one is asked.

    Raises:
        InvalidInputError: it does not name one device.
    """
    try:
        names = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(UniformResourceIdentifier)
    except (ExtensionNotFound, ValueError) as error:
        msg = "the certificate has not one URI that says whose it is: enrol the device again"
        raise InvalidInputError(msg) from error
    if not uri.startswith(_DEVICES):
        msg = f"the certificate is for {uri[:100]!r}, which is no device"
        raise InvalidInputError(msg)
    return check_name(uri.removeprefix(_DEVICES), "device")
