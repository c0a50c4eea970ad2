"""Deltas between two weights files: changed codes only, exact, checked at both ends."""

from edge.delta.apply import apply
from edge.delta.encode import DeltaInfo, encode
from edge.delta.format import Header, read_header

__all__ = ["DeltaInfo", "Header", "apply", "encode", "read_header"]
