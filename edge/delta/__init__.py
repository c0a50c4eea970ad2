"""Deltas between two weights files: exact, checked at both ends (docs/reference/delta.md)."""

from edge.delta.apply import apply
from edge.delta.encode import DeltaInfo, Stretch, encode
from edge.delta.format import Header, Tensor, read_header
from edge.delta.kept import load_updates, save_updates
from edge.delta.layout import stretches_between, tensors_in
from edge.delta.payload import Update
from edge.delta.product import Factors, Product

__all__ = [
    "DeltaInfo",
    "Factors",
    "Header",
    "Product",
    "Stretch",
    "Tensor",
    "Update",
    "apply",
    "encode",
    "load_updates",
    "read_header",
    "save_updates",
    "stretches_between",
    "tensors_in",
]
