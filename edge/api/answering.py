"""One request answered by one student, a pass at a time: prompt, guidance, answer. No HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from edge.api.fields import RequestError
from edge.api.replies import Completion, Head, Piece, Spelled
from edge.api.tools import AnswerStream
from edge.student.guide import GrammarError, calls_grammar, schema_grammar
from edge.student.runtime import Decoding, greedy
from protos.prompt import Message, chat
from protos.tools import with_tools

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from edge.api.wire import ChatRequest
    from edge.host import Answering, StudentT
    from edge.student.tokens import Token
    from protos.harness import Harness
    from protos.prompt import Shown


class Recalls(Protocol):
    """What is needed of a working memory (``edge/memory/store.py``)."""

    def nearest(
        self, messages: Sequence[Message], *, limit: int, min_similarity: float
    ) -> Sequence[Shown]:
        """Demonstrations that are near to a request, the nearest last."""
        ...


@dataclass(frozen=True)
class Made:
    """An answer and what is known of it.

    Attributes:
        completion: for the client.
        messages: what was asked, with the tools that were offered.
        tokens: of the answer.
        schema_broken: the answer breaks the harness's schema, or the student alone would have.
    """

    completion: Completion
    messages: tuple[Message, ...]
    tokens: tuple[Token, ...]
    schema_broken: bool

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(t.text for t in self.tokens)


def answer(
    request: ChatRequest,
    student: StudentT,
    *,
    unique: str,
    created: int,
    memory: Recalls,
    drifted: bool,
    tell: Callable[[Head, Piece], None],
) -> Generator[None, None, Made]:
    """Answer a request; gives way after each pass. Runs in the student's thread.

    Args:
        request: what is asked.
        student: answers.
        unique: makes ids of it.
        created: seconds since 1970.
        memory: demonstrations to show.
        drifted: whether a drift alarm holds.
        tell: is given each piece of the answer.

    Raises:
        ContextLengthError: the request does not fit, even without demonstrations.
        RequestError: its schemas cannot guide, or it wants more tokens than the context holds.
    """
    harness = student.harness
    head = Head(f"chatcmpl-{unique}", created, student.digest)
    asked = with_tools(request.messages, harness.system, request.offer.tools)
    near = harness.memory_similarity_drifted if drifted else harness.memory_similarity
    shown = memory.nearest(request.messages, limit=harness.memory_shown, min_similarity=near)
    decoding = decoding_of(request, harness)
    if (request.max_tokens or 0) > student.context_length:
        msg = (
            f"max_completion_tokens is {request.max_tokens}; the student's context holds "
            f"{student.context_length} tokens: ask for fewer"
        )
        raise RequestError(msg, param="max_completion_tokens")
    messages = fit(student, asked, shown, room=decoding.max_tokens)
    try:
        run = student.begin(messages, decoding)
    except GrammarError as error:
        raise _refused(request, error) from error
    stream = AnswerStream([t.name for t in request.offer.callable], f"call_{unique}")
    spelling = _Spelling(student.bytes_of, wanted=request.top_logprobs is not None)
    try:
        tokens = yield from _pieces(run, stream, spelling, lambda piece: tell(head, piece))
    except GrammarError as error:
        raise _refused(request, error) from error
    finally:
        run.close()
    reason = run.finish_reason or "stop"
    text = "".join(t.text for t in tokens)
    bent = harness.guided and request.plain and any(t.bent for t in tokens)
    return Made(
        completion=Completion(
            head=head,
            content=stream.content,
            finish_reason="tool_calls" if stream.call and reason == "stop" else reason,
            prompt_tokens=run.prompt_tokens,
            completion_tokens=len(tokens),
            call=stream.call,
            spelled=spelling.all,
        ),
        messages=tuple(asked),
        tokens=tuple(tokens),
        schema_broken=bent or harness.breaks_schema(text),
    )


class _Spelling:
    """Tokens as log-probabilities show them: all, and those since they were last taken."""

    def __init__(self, bytes_of: Callable[[int], bytes], *, wanted: bool) -> None:
        self._bytes_of = bytes_of
        self._wanted = wanted
        self._all: list[Spelled] = []
        self._taken = 0

    @property
    def all(self) -> tuple[Spelled, ...] | None:
        return tuple(self._all) if self._wanted else None

    def add(self, token: Token) -> None:
        if self._wanted:
            top = tuple(Spelled(self._bytes_of(i), p) for i, p in token.top)
            self._all.append(Spelled(self._bytes_of(token.id), token.logprob, top))

    def take(self) -> tuple[Spelled, ...] | None:
        start, self._taken = self._taken, len(self._all)
        return tuple(self._all[start:]) if self._wanted else None


def _pieces(
    run: Answering, stream: AnswerStream, spelling: _Spelling, tell: Callable[[Piece], None]
) -> Generator[None, None, list[Token]]:
    tokens: list[Token] = []
    while not run.done:
        for token in run.advance():
            tokens.append(token)
            spelling.add(token)
            for delta in stream.add(token.text) if token.text else ():
                tell(Piece(delta, spelling.take()))
        yield
    for delta in stream.end():
        tell(Piece(delta, spelling.take()))
    rest = spelling.take()
    if rest:  # tokens that made no text of their own
        tell(Piece({}, rest))
    return tokens


def decoding_of(request: ChatRequest, harness: Harness) -> Decoding:
    """How a request is decoded.

    Raises:
        RequestError: a schema cannot guide.
    """
    offer = request.offer
    usual = greedy(harness)
    grammar = usual.grammar if request.plain else None
    try:
        if offer.callable:
            tools = {t.name: t.parameters for t in offer.callable}
            grammar = calls_grammar(tools, request.schema, must_call=offer.must_call)
        elif request.schema is not None:
            grammar = schema_grammar(request.schema)
    except GrammarError as error:
        raise _refused(request, error) from error
    return replace(
        usual,
        max_tokens=request.max_tokens or usual.max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        stop=request.stop,
        grammar=grammar,
        top_logprobs=request.top_logprobs,
    )


def _refused(request: ChatRequest, error: GrammarError) -> Exception:
    if request.plain:  # the harness's schema: not the client's fault
        return RuntimeError(f"the harness's schema: {error}")
    return RequestError(str(error), param="tools" if request.offer.tools else "response_format")


def fit(
    student: StudentT, messages: Sequence[Message], shown: Sequence[Shown], *, room: int
) -> list[Message]:
    """The prompt for a request, with as many demonstrations as leave ``room`` for the answer.

    The farthest demonstrations, which stand first, are dropped first. Without any the prompt may
    still be too long.
    """
    for dropped in range(len(shown) + 1):
        prompt = chat(student.harness.system, messages, shown[dropped:])
        if student.prompt_tokens(prompt) + room <= student.context_length:
            break
    return prompt
