"""A second opinion on the exported graph: Optimum's own export of the same model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest

from cloud.gate.gate import log_softmax
from edge.student.runtime import Student

if TYPE_CHECKING:
    from pathlib import Path

_FEW = 48


@pytest.mark.filterwarnings("ignore")  # tracing warns of much that does not matter here
def test_the_students_graph_says_what_optimums_export_says(
    tiny_folder: Path, tiny_student: Path, tmp_path: Path
) -> None:
    from optimum.exporters.onnx import main_export

    main_export(
        str(tiny_folder),
        output=tmp_path,
        task="text-generation",
        library_name="transformers",
        do_validation=False,
    )
    theirs = ort.InferenceSession(tmp_path / "model.onnx")
    ours = Student.open(tiny_student / "bundle")
    ids = np.random.default_rng(0).integers(3, 250, _FEW)
    feed = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, _FEW), np.int64),
        "position_ids": np.arange(_FEW)[None],
    }
    (expected,) = theirs.run(["logits"], feed)
    found = log_softmax(ours.logits(ids.tolist(), 0))
    wanted = log_softmax(expected[0])
    kl = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    assert kl.mean() < 0.01  # what 8 bits cost; a wrong position or mask costs whole nats
