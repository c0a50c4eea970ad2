"""Tables of the release store."""

from __future__ import annotations

from sqlalchemy.orm import Mapped, mapped_column

from cloud.db import Base


class ReleaseRow(Base):
    """One release of a channel.

    ``manifest`` names the blob with the serialized Manifest. ``way_back`` names one that makes the
    content of an earlier release the next version: what a rollback needs, signed before it is
    needed. It is empty where there is nothing to go back to.
    """

    __tablename__ = "manifests"

    channel: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    student: Mapped[str]
    manifest: Mapped[str]
    manifest_bytes: Mapped[int]
    way_back: Mapped[str]
    way_back_bytes: Mapped[int]
    created_ms: Mapped[int]
    withdrawn: Mapped[bool]
    full_bytes: Mapped[int]
    delta_bytes: Mapped[int]


class ReleaseBlobRow(Base):
    """A blob that devices of a channel may read; ``kind``: ``manifest``, ``file`` or ``delta``."""

    __tablename__ = "release_blobs"

    channel: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]


class DeltaRow(Base):
    """A delta that was built, or found not worth its bytes (``sha256`` is empty)."""

    __tablename__ = "release_deltas"

    base_sha256: Mapped[str] = mapped_column(primary_key=True)
    target_sha256: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    size: Mapped[int]
