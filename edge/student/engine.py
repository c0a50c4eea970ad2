"""ONNX Runtime: one session for all chats, and the keys and values of each chat.

The graph updates a chat's buffers in place (IOBinding, past and present share memory).

**Passes are exact.** How a row of a pass comes out does not depend on how many rows the pass has,
as long as it has two: ONNX Runtime multiplies a single row by another kernel, whose last bits
differ, and int8 activations turn last bits into whole steps (up to 1.3 in a logit of the 135M
student). So no pass has one row: where one token would go in, the token before it is computed once
more, which costs next to nothing and writes the same bits. Thereby a prompt may be cut anywhere, a
prefix may come from a cache and tokens may be guessed ahead without a change to any answer.
:meth:`Engine.exact` finds out whether that holds on this machine.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from protos.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_SPIN_US = "20"
_GRAIN = 256  # buffers grow by so many positions, so that short chats take little memory
_TRIAL = 32  # tokens by which exactness is tried
_CUTS = (7, 2, 1, 4, 1, 9, 3, 5)
_TIMES = 3
_WORTHS = (1.0, 16.0)
_ROWS = 16  # of logits, in memory that is used again


class KeyValues:
    """Keys and values of one chat: of ``ids``, in buffers with room for ``capacity`` tokens."""

    def __init__(self, session: ort.InferenceSession, config: Mapping[str, Any]) -> None:
        self.ids: list[int] = []
        self.capacity = 0
        self.buffers: list[ort.OrtValue] = []
        self.binding = session.io_binding()
        self._session = session
        self._config = config

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.capacity * position_bytes(self._config)

    def reserve(self, length: int, grain: int = _GRAIN) -> None:
        """Make room for ``length`` tokens; what is there stays."""
        wanted = min(-(-length // grain) * grain, self._config["context_length"])
        if wanted <= self.capacity:
            return
        shape = (1, self._config["kv_heads"], wanted, self._config["head_size"])
        valid = min(self.capacity, len(self.ids))
        grown = []
        for i in range(2 * self._config["layers"]):
            array = np.zeros(shape, dtype=np.float32)
            if valid:
                array[:, :, :valid] = self.buffers[i].numpy()[:, :, :valid]
            grown.append(ort.OrtValue.ortvalue_from_numpy(array))
        self.buffers, self.capacity = grown, wanted
        for i, buffer in enumerate(grown):
            part = f"{i // 2}.{'value' if i % 2 else 'key'}"
            self.binding.bind_ortvalue_input(f"past.{part}", buffer)
            self.binding.bind_ortvalue_output(f"present.{part}", buffer)

    def truncate(self, length: int) -> None:
        """Forget what comes after the first ``length`` tokens."""
        del self.ids[length:]

    def copy(self, length: int, *, room: int, grain: int = _GRAIN) -> KeyValues:
        """Keys and values of the first ``length`` tokens, in buffers with ``room`` for more."""
        twin = KeyValues(self._session, self._config)
        twin.reserve(max(room, length), grain)
        for ours, theirs in zip(self.buffers, twin.buffers, strict=True):
            theirs.numpy()[:, :, :length] = ours.numpy()[:, :, :length]
        twin.ids = self.ids[:length]
        return twin


class Engine:
    """One ONNX Runtime session. One pass at a time: callers hold a lock."""

    def __init__(self, session: ort.InferenceSession, config: Mapping[str, Any]) -> None:
        self._session: ort.InferenceSession | None = session
        self._config = config
        self._exact: bool | None = None
        self._worth: float | None = None
        self._logits: Floats | None = None

    def close(self) -> None:
        """Free the session's memory; no pass is possible after that."""
        self._session = self._logits = None

    def open_chat(self) -> KeyValues:
        """Empty keys and values.

        Raises:
            IntegrityError: the engine is closed.
        """
        return KeyValues(self.session, self._config)

    def forward(self, chat: KeyValues, ids: Sequence[int], wanted: Iterable[int]) -> Floats:
        """Compute ``ids`` as what follows in ``chat``, whose keys and values then hold them too.

        Returns:
            Logits [len(wanted), vocabulary] after the tokens at the positions ``wanted`` of
            ``ids``. They stand until the next pass: who needs them longer copies them.
        """
        session = self.session
        start, fresh, rows = len(chat.ids), list(ids), list(wanted)
        if len(fresh) == 1 and start:
            start, fresh = start - 1, [chat.ids[-1], *fresh]
            rows = [r + 1 for r in rows]
        total = start + len(fresh)
        if len(fresh) == 1:  # the first token of all: a second row that nobody reads
            fresh, total = fresh * 2, 2
        chat.reserve(total)
        binding, value = chat.binding, ort.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input("input_ids", value(np.array([fresh], dtype=np.int64)))
        binding.bind_ortvalue_input("seqlens_k", value(np.array([total - 1], dtype=np.int32)))
        binding.bind_ortvalue_input("total_length", value(np.array(total, dtype=np.int32)))
        binding.bind_ortvalue_input("rows", value(np.array(rows, dtype=np.int64)))
        logits = self._room(len(rows))
        binding.bind_ortvalue_output("head.out", value(logits))
        session.run_with_iobinding(binding)
        chat.ids.extend(ids)
        return logits

    def _room(self, rows: int) -> Floats:
        """Where a pass writes logits [rows, vocabulary]; fresh memory would cost page faults."""
        size = self._config["vocabulary"]
        if rows > _ROWS:
            return np.empty((rows, size), np.float32)
        if self._logits is None:
            self._logits = np.empty((_ROWS, size), np.float32)
        return self._logits[:rows]

    @property
    def exact(self) -> bool:
        """Whether rows come out the same to the bit however a text is cut into passes.

        Tried once, with one text and several cuts: evidence for this machine, not a proof.
        """
        if self._exact is None:
            length = min(_TRIAL, self._config["context_length"])
            text = self._trial_text(length)
            whole = self.forward(self.open_chat(), text, range(length))
            chat, parts, start = self.open_chat(), [], 0
            for cut in _CUTS:
                part = text[start : start + cut]
                if part:
                    parts.append(self.forward(chat, part, range(len(part))).copy())
                start += cut
            self._exact = np.array_equal(whole, np.concatenate(parts))
        return self._exact

    @property
    def worth(self) -> float:
        """How many rows cost as much as what a pass costs besides its rows.

        Measured once: weights are read once a pass, so it is small where arithmetic is slow (2 on
        x86 with AVX2) and large where memory is. It decides how boldly to guess, not what is said.
        """
        if self._worth is None:
            length = min(_TRIAL, self._config["context_length"])
            text, seconds = self._trial_text(length), dict[int, float]()
            for rows in (2, length) * _TIMES:
                chat, start = self.open_chat(), time.perf_counter()
                self.forward(chat, text[:rows], range(rows))
                took = time.perf_counter() - start
                seconds[rows] = min(took, seconds.get(rows, took))
            row = (seconds[length] - seconds[2]) / (length - 2)
            least, most = _WORTHS
            worth = (seconds[2] - 2 * row) / row if row > 0 else most
            self._worth = min(max(worth, least), most)
        return self._worth

    def _trial_text(self, length: int) -> list[int]:
        spread = self._config["vocabulary"] // (length + 1)
        return [1 + spread * i for i in range(length)]

    @property
    def session(self) -> ort.InferenceSession:
        """The session.

        Raises:
            IntegrityError: the engine is closed.
        """
        if self._session is None:
            msg = "the student is closed: it answers no more"
            raise IntegrityError(msg)
        return self._session


def position_bytes(config: Mapping[str, Any]) -> int:
    """Bytes that the keys and values of one token take.

    >>> position_bytes({"layers": 30, "kv_heads": 3, "head_size": 64})
    46080
    """
    return int(2 * config["layers"] * config["kv_heads"] * config["head_size"] * 4)


def open_session(folder: Path, *, threads: int) -> ort.InferenceSession:
    """A session on a bundle's graph and weights; raises what ONNX Runtime raises."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Between two operators a worker that sleeps costs a tenth of decoding. It spins for so long
    # only: by default it spins for milliseconds, and starves other processes of a small machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    return ort.InferenceSession(
        str(folder / "graph.onnx"), options, providers=["CPUExecutionProvider"]
    )
