"""What the imported model says to the anchors, kept from job to job.

It is the same for every job of one import, and to read some hundred answers takes a tenth of a
job. Kept are its distributions, and what the frozen layers make of the anchors. The file is whole
or not there, and carries a key of what decides it to the last bit; under another key it is not
read. Jobs of one folder run one at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cloud.learners.checkpoint import key_of, read, write
from cloud.learners.targets import Target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloud.learners.model import SplitModel
    from cloud.learners.packing import Example

FILE = "anchors.pt"
_FORMAT = 1


class Memory:
    """The anchors of one import as one learner sees them.

    Args:
        folder: where the file lies; None: nothing is kept.
        model: the imported one.
        anchors: in tokens.
        how: options that change what is kept.
    """

    def __init__(
        self, folder: Path | None, model: SplitModel, anchors: Sequence[Example], *how: int
    ) -> None:
        self._path = folder / FILE if folder and anchors else None
        self._model = model
        self._anchors = anchors
        self._how = how
        self._key = ""

    def load(self) -> list[Target] | None:
        """Distributions of the anchors, if they are known; the model need not read them again."""
        if self._path is None:
            return None
        made_by = (_FORMAT, torch.__version__, torch.get_num_threads(), self._model.device.type)
        what = (self._anchors, self._how, self._model.split, self._model.bf16)
        self._key = key_of((made_by, what), self._model.everything())
        raw = read(self._path, self._key)
        if raw is None:
            return None
        device = self._model.device
        self._model.put(self._anchors, [h.to(device) for h in raw["hidden"]])
        return [Target.from_state(t).to(device) for t in raw["targets"]]

    def save(self, targets: Sequence[Target]) -> None:
        """Keep them, after :meth:`load` found nothing; a full disk costs this job nothing."""
        if self._path is not None:
            hidden = self._model.made_of(self._anchors)
            write(
                self._path, self._key, {"hidden": hidden, "targets": [t.state() for t in targets]}
            )
