"""Answer chats with a student bundle through ONNX Runtime.

The key-value cache lives in fixed buffers that the graph updates in place (IOBinding, past and
present share memory); a request reuses the prefix it has in common with the one before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from edge.student import bundle
from protos.errors import ContextLengthError, IntegrityError
from protos.prompt import Message, render

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_GRAIN = 256  # the cache grows by so many positions, so that short chats take little memory
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Decoding:
    """How to decode: ``temperature`` 0 is greedy; ``stop`` are texts that end an answer."""

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Token:
    """One decoded token; ``text`` is empty while a character is incomplete; ``logprob`` in nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Answer:
    """A whole answer; ``surprise`` is the mean of ``-logprob`` over its tokens, in nats."""

    text: str
    surprise: float
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def open_session(folder: Path, *, threads: int) -> ort.InferenceSession:
    """A session on a bundle's graph and weights; raises what ONNX Runtime raises."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads of one process starve every other process of a small machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        str(folder / "graph.onnx"), options, providers=["CPUExecutionProvider"]
    )


class Engine:
    """One ONNX Runtime session with its key-value buffers, for ``batch`` rows at once."""

    def __init__(
        self, session: ort.InferenceSession, config: dict[str, Any], batch: int = 1
    ) -> None:
        self._session = session
        self._config = config
        self._binding = session.io_binding()
        self._batch = batch
        self.capacity = 0
        self._buffers: list[ort.OrtValue] = []

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions a row; what is cached stays."""
        wanted = min(-(-length // _GRAIN) * _GRAIN, self._config["context_length"])
        if wanted <= self.capacity:
            return
        shape = (self._batch, self._config["kv_heads"], wanted, self._config["head_size"])
        grown = []
        for i in range(2 * self._config["layers"]):
            array = np.zeros(shape, dtype=np.float32)
            if self._buffers:
                array[:, :, : self.capacity] = self._buffers[i].numpy()
            grown.append(ort.OrtValue.ortvalue_from_numpy(array))
        self._buffers, self.capacity = grown, wanted

    def forward(
        self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], rows: Sequence[int]
    ) -> Floats:
        """Run ``ids`` [batch, n]; row ``b`` then has ``lengths[b]`` valid positions in its cache.

        Returns:
            Logits [len(rows), vocabulary] at the flattened positions ``rows`` of ``ids``.
        """
        binding, value = self._binding, ort.OrtValue.ortvalue_from_numpy
        total = np.array(lengths.max(), dtype=np.int32)
        binding.bind_ortvalue_input("input_ids", value(ids))
        binding.bind_ortvalue_input("seqlens_k", value((lengths - 1).astype(np.int32)))
        binding.bind_ortvalue_input("total_length", value(total))
        binding.bind_ortvalue_input("rows", value(np.array(rows, dtype=np.int64)))
        for i, buffer in enumerate(self._buffers):
            part = f"{i // 2}.{'value' if i % 2 else 'key'}"
            binding.bind_ortvalue_input(f"past.{part}", buffer)
            binding.bind_ortvalue_output(f"present.{part}", buffer)
        binding.bind_output("head.out", "cpu")
        self._session.run_with_iobinding(binding)
        logits: Floats = binding.get_outputs()[-1].numpy()
        return logits


class Student:
    """A student bundle, open. One request at a time: callers hold a lock (``edge/host.py``)."""

    def __init__(self, folder: Path, session: ort.InferenceSession, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.digest = bundle.digest(folder)
        self.harness = bundle.read_harness(folder)
        self.tokenizer = tokenizer
        self.config = bundle.read_config(folder)
        self.context_length: int = self.config["context_length"]
        self._session: ort.InferenceSession | None = session
        self._eos = frozenset(self.config["eos"])
        self._engine = Engine(session, self.config)
        self._cached: list[int] = []

    @classmethod
    def open(cls, folder: Path, *, threads: int = 2) -> Self:
        """Open a bundle.

        Raises:
            IntegrityError: a file is missing, or the runtime cannot load the graph.
        """
        try:
            session = open_session(folder, threads=threads)
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return cls(folder, session, tokenizer)
        except IntegrityError:
            raise
        except Exception as error:  # the runtime and tokenizers raise many unrelated kinds
            msg = f"the student in {folder} cannot be opened: {error}"
            raise IntegrityError(msg) from error

    def close(self) -> None:
        """Free the session's memory; the student answers no more."""
        self._session = None
        del self._engine

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the answer begins."""
        ids: list[int] = self.tokenizer.encode(render(messages), add_special_tokens=False).ids
        return ids

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """How many tokens a chat takes before its answer."""
        return len(self.encode(messages))

    def stream(self, messages: Sequence[Message], decoding: Decoding) -> Iterator[Token]:
        """Decode token by token; the end-of-answer token is not yielded.

        Raises:
            ContextLengthError: before the first token, when the prompt does not fit.
        """
        ids = self.encode(messages)
        room = self.context_length - len(ids)
        if room < 1:
            msg = (
                f"the prompt takes {len(ids)} tokens and the student's context holds "
                f"{self.context_length} with the answer: shorten the prompt"
            )
            raise ContextLengthError(msg)
        return self._decode(ids, min(decoding.max_tokens, room), decoding)

    def _decode(self, ids: list[int], limit: int, decoding: Decoding) -> Iterator[Token]:
        """Tokens are held back while a character is incomplete, or a stop text may have begun."""
        rng = np.random.default_rng(decoding.seed)
        decoded: list[int] = []
        shown, tail, held = "", "", list[Token]()
        logits = self._prefill(ids)
        for step in range(limit):
            token, logprob = choose(logits, decoding.temperature, rng)
            if token in self._eos:
                break
            decoded.append(token)
            text = self.tokenizer.decode(decoded, skip_special_tokens=True)
            # A last character that is no text yet may become some with the next token.
            fresh, tail = text[len(shown) :], ""
            if text.endswith(_REPLACEMENT):
                fresh, tail = "", fresh
            shown += fresh
            held.append(Token(token, fresh, logprob))
            pending = "".join(t.text for t in held)
            cut = first_stop(pending, decoding.stop)
            if cut is not None:
                yield from shorten(held, cut)
                return
            if not tail and not may_stop(pending, decoding.stop):
                yield from held
                held = []
            if step + 1 < limit:
                logits = self._step(token)
        if tail:  # no token follows: it is what a decoder makes of the bytes there are
            held[-1] = replace(held[-1], text=tail)
            cut = first_stop("".join(t.text for t in held), decoding.stop)
            held = held if cut is None else list(shorten(held, cut))
        yield from held

    def _prefill(self, ids: list[int]) -> Floats:
        shared = 0
        for ours, theirs in zip(self._cached, ids[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        fresh = ids[shared:]
        self._engine.reserve(len(ids) + 1)
        self._cached = []  # an exception on the way must not leave a prefix that is not there
        lengths = np.array([len(ids)], dtype=np.int32)
        logits = self._engine.forward(np.array([fresh], dtype=np.int64), lengths, [len(fresh) - 1])
        self._cached = list(ids)
        last: Floats = logits[0]
        return last

    def _step(self, token: int) -> Floats:
        self._cached.append(token)
        length = len(self._cached)
        self._engine.reserve(length)
        lengths = np.array([length], dtype=np.int32)
        logits: Floats = self._engine.forward(np.array([[token]], dtype=np.int64), lengths, [0])[0]
        return logits

    def answer(self, messages: Sequence[Message], decoding: Decoding) -> Answer:
        """Decode a whole answer.

        Raises:
            ContextLengthError: the prompt does not fit.
        """
        prompt = self.prompt_tokens(messages)
        tokens = list(self.stream(messages, decoding))
        room = min(decoding.max_tokens, self.context_length - prompt)
        text = "".join(t.text for t in tokens)
        return Answer(
            text=text,
            surprise=surprise(tokens),
            finish_reason="length" if len(tokens) >= room else "stop",
            prompt_tokens=prompt,
            completion_tokens=len(tokens),
        )

    def answer_all(self, chats: Sequence[Sequence[Message]], max_tokens: int) -> list[Answer]:
        """Greedy answers to many chats, decoded side by side: what the gate uses."""
        order = sorted(range(len(chats)), key=lambda i: -self.prompt_tokens(chats[i]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            batch = self._answer_batch([self.encode(chats[i]) for i in part], max_tokens)
            answers.update(zip(part, batch, strict=True))
        return [answers[i] for i in range(len(chats))]

    def _answer_batch(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        longest = max(map(len, prompts))
        limit = min(max_tokens, self.context_length - longest)
        if limit < 1:
            msg = (
                f"a prompt of {longest} tokens leaves no room in a context of {self.context_length}"
            )
            raise ContextLengthError(msg)
        engine = Engine(self._live(), self.config, len(prompts))
        engine.reserve(longest + limit)
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        lengths = np.array([len(p) for p in prompts], dtype=np.int32)
        logits = engine.forward(
            ids, lengths, [r * longest + len(p) - 1 for r, p in enumerate(prompts)]
        )
        decoded: list[list[tuple[int, float]]] = [[] for _ in prompts]
        alive = [True] * len(prompts)
        for step in range(limit):
            tokens = logits.argmax(axis=1)
            for row, token in enumerate(tokens.tolist()):
                if not alive[row]:
                    continue
                if token in self._eos:
                    alive[row] = False
                else:
                    decoded[row].append((token, logprob_of(logits[row], token)))
            if not any(alive) or step + 1 == limit:
                break
            lengths = lengths + 1
            rows = range(len(prompts))
            logits = engine.forward(tokens.astype(np.int64)[:, None], lengths, list(rows))
        return [
            Answer(
                text=self.tokenizer.decode([t for t, _ in out], skip_special_tokens=True),
                surprise=-sum(p for _, p in out) / len(out) if out else 0.0,
                finish_reason="length" if still else "stop",
                prompt_tokens=len(prompt),
                completion_tokens=len(out),
            )
            for prompt, out, still in zip(prompts, decoded, alive, strict=True)
        ]

    def logits(self, ids: Sequence[int], first: int) -> Floats:
        """Teacher-forced logits [len(ids) - first, vocabulary] at ``first`` and after."""
        engine = Engine(self._live(), self.config)
        engine.reserve(len(ids))
        lengths = np.array([len(ids)], dtype=np.int32)
        return engine.forward(np.array([ids], dtype=np.int64), lengths, range(first, len(ids)))

    def _live(self) -> ort.InferenceSession:
        if self._session is None:
            msg = f"the student in {self.folder} is closed"
            raise IntegrityError(msg)
        return self._session


_BATCH = 16


def surprise(tokens: Sequence[Token]) -> float:
    """Mean negative log-likelihood of decoded tokens in nats; 0 for none.

    >>> surprise([Token(1, "a", -0.5), Token(2, "b", -1.5)])
    1.0
    """
    return -sum(t.logprob for t in tokens) / len(tokens) if tokens else 0.0


def logprob_of(logits: Floats, token: int) -> float:
    """Natural log of the probability of ``token`` under ``logits`` [vocabulary]."""
    peak = float(logits.max())
    return float(logits[token]) - peak - math.log(float(np.exp(logits - peak).sum()))


def choose(logits: Floats, temperature: float, rng: np.random.Generator) -> tuple[int, float]:
    """Pick a token from ``logits`` [vocabulary]; returns (id, log-probability at temperature 1)."""
    if temperature > 0:
        scaled = (logits - logits.max()).astype(np.float64) / temperature
        p = np.exp(scaled)
        token = int(rng.choice(len(p), p=p / p.sum()))
    else:
        token = int(logits.argmax())
    return token, logprob_of(logits, token)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins, or None.

    >>> first_stop("one. two", [" two", "."])
    3
    """
    found = [i for i in (text.find(s) for s in stops if s) if i >= 0]
    return min(found, default=None)


def may_stop(text: str, stops: Sequence[str]) -> bool:
    """Whether the end of ``text`` may be the beginning of a stop text.

    >>> may_stop("one.", [". "]), may_stop("one", [". "])
    (True, False)
    """
    return any(text.endswith(s[:n]) for s in stops for n in range(1, len(s)))


def shorten(tokens: Sequence[Token], length: int) -> Iterator[Token]:
    """The first ``length`` characters of tokens, as tokens.

    >>> [t.text for t in shorten([Token(1, "ab", -1.0), Token(2, "cd", -1.0)], 3)]
    ['ab', 'c']
    """
    for token in tokens:
        if length <= 0:
            return
        yield Token(token.id, token.text[:length], token.logprob)
        length -= len(token.text)
