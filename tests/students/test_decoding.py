"""Guided and speculative decoding with the tiny student: faster, and not a token different."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.student.engine import Engine
from edge.student.guide import GrammarError, calls_grammar, closed, schema_grammar
from edge.student.lookup import Guess, Guesser, PastAnswers, Request, Spelling, shape
from edge.student.runtime import Decoding, Student, Token
from protos.prompt import Message, chat

if TYPE_CHECKING:
    from pathlib import Path

Json = dict[str, Any]
CALL: Json = {
    "type": "object",
    "properties": {
        "name": {"enum": ["TurnOn", "TurnOff", "Toggle"]},
        "arguments": {
            "type": "object",
            "properties": {
                "area": {"enum": ["kitchen", "kitchenette", "hall"]},
                "level": {"type": "integer", "minimum": 0, "maximum": 100},
            },
            "required": ["area"],
        },
    },
    "required": ["name", "arguments"],
}
TEXT: Json = {
    "type": "object",
    "properties": {"say": {"type": "string", "maxLength": 20}, "sure": {"type": "boolean"}},
    "required": ["say", "sure"],
}
GRAMMARS = (
    None,
    schema_grammar(CALL),
    schema_grammar(TEXT),
    calls_grammar({"lamp": CALL["properties"]["arguments"]}, None, must_call=False),
)


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> Student:
    """Warmed, as agents serve it: what is measured of the machine once is no pass of a test."""
    opened = Student.open(tiny_student / "bundle")
    opened.warm(opened.warmth())
    return opened


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each pass that is made."""
    made: list[int] = []
    forward = Engine.forward

    def counted(*args: Any) -> Any:  # noqa: ANN401 - handed on
        made.append(len(args[2]))
        return forward(*args)

    monkeypatch.setattr(Engine, "forward", counted)
    return made


def ask(text: str) -> list[Message]:
    return chat("Be brief.", [Message("user", text)])


def ids(student: Student, text: str, decoding: Decoding) -> list[int]:
    return [t.id for t in student.stream(ask(text), decoding)]


def one_by_one(decoding: Decoding) -> Decoding:
    """Plain decoding: with log-probabilities and without guesses every token has its own pass."""
    return replace(decoding, top_logprobs=0, speculate=False)


def test_two_hundred_prompts_are_answered_as_plain_greedy_decoding_answers_them(
    tiny_student: Path, passes: list[int]
) -> None:
    """Prompts are alike, so that past answers are guessed, rightly and wrongly."""
    rng = random.Random(4)
    fast, plain = (Student.open(tiny_student / "bundle") for _ in range(2))
    count = {"fast": 0, "plain": 0}
    for number in range(200):
        text = " ".join(rng.choices(["lamp", "on", "off", "hall", "the", '{"name":"'], k=4))
        decoding = Decoding(
            max_tokens=rng.choice([1, 7, 40]), grammar=GRAMMARS[number % len(GRAMMARS)]
        )
        passes.clear()
        got = ids(fast, text, decoding)
        count["fast"] += len(passes)
        passes.clear()
        assert got == ids(plain, text, one_by_one(decoding)), (number, text)
        count["plain"] += len(passes)
    assert count["fast"] < 0.75 * count["plain"]  # a random student says little twice


@given(
    text=st.text(max_size=20).filter(lambda t: "<|" not in t),
    grammar=st.sampled_from(GRAMMARS),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(0, 99),
    limit=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_guesses_change_no_answer_not_even_a_sampled_one(
    student: Student, text: str, grammar: str | None, temperature: float, seed: int, limit: int
) -> None:
    decoding = Decoding(limit, temperature=temperature, seed=seed, grammar=grammar)
    got = ids(student, text, decoding)
    assert got == ids(student, text, one_by_one(decoding))
    assert got == ids(student, text, replace(decoding, top_logprobs=2))
    assert len(got) <= limit


def test_no_pass_s_result_depends_on_how_a_text_is_cut(student: Student) -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(3, 250, 700).tolist()
    engine = student._engine
    assert engine.exact
    whole = engine.forward(engine.open_chat(), text, range(len(text))).copy()
    parts, chat_, start = [], engine.open_chat(), 0
    while start < len(text):
        part = text[start : start + int(rng.choice([1, 1, 2, 3, 8, 90]))]
        parts.append(engine.forward(chat_, part, range(len(part))).copy())
        start += len(part)
    assert np.array_equal(whole, np.concatenate(parts))


def test_where_passes_are_not_exact_every_token_has_its_own(
    tiny_student: Path, passes: list[int]
) -> None:
    careful = Student.open(tiny_student / "bundle")
    careful._engine._exact = False
    decoding = Decoding(40, grammar=GRAMMARS[1])
    careful.answer(ask("lamp"), decoding)
    passes.clear()
    answer = careful.answer(ask("lamp"), decoding)
    assert max(passes) == 1
    assert len(passes) == answer.completion_tokens


@pytest.mark.parametrize("schema", [CALL, TEXT])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guided_answer_satisfies_its_schema(
    student: Student, schema: Json, temperature: float
) -> None:
    for seed in range(5):
        decoding = Decoding(200, temperature, seed, grammar=schema_grammar(schema))
        answer = student.answer(ask(f"do {seed}"), decoding)
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), schema)


def test_forced_tokens_cost_no_pass_of_their_own(student: Student, passes: list[int]) -> None:
    only: Json = {"const": {"name": "TurnOn", "arguments": {}}}
    decoding = Decoding(80, grammar=schema_grammar(only))
    tokens = list(student.stream(ask("lamp"), decoding))
    assert "".join(t.text for t in tokens) == '{"name":"TurnOn","arguments":{}}'
    assert all(t.forced for t in tokens)
    assert passes == []  # nothing was left to decide
    passes.clear()
    tokens = list(student.stream(ask("lamp"), Decoding(80, grammar=GRAMMARS[1], speculate=False)))
    assert len(passes) == sum(not t.forced for t in tokens)


def test_forced_text_has_the_tokens_that_the_tokenizer_gives_it(packaged_tokenizer: Path) -> None:
    """A real vocabulary: pieces of several letters, that meet across what is forced."""
    from tokenizers import Tokenizer

    from edge.student.guide import Guides

    tokenizer = Tokenizer.from_file(str(packaged_tokenizer))
    guides = Guides(packaged_tokenizer, vocabulary=tokenizer.get_vocab_size(), eos=[2])
    for name in ("TurnOn", "TurnOff", "Toggle"):
        for area in ("kitchen", "kitchenette", "hall"):
            text = f'{{"name":"{name}","arguments":{{"area":"{area}"}}}}'
            wanted = tokenizer.encode(text, add_special_tokens=False).ids
            guide, forced = guides.follow(schema_grammar(CALL)), 0
            got: list[int] = []
            while not guide.complete and len(got) < len(wanted):
                must = guide.forced()
                if must:
                    allowed = np.flatnonzero(guide.allowed())
                    assert allowed.tolist() == must[:1]
                forced += len(must)
                step = must or [wanted[len(got)]]
                guide.consume(step)
                got += step
            assert got == wanted
            assert forced > len(wanted) / 2


@pytest.fixture(scope="module")
def packaged_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cloud.students import source
    from protos.errors import InvalidInputError

    try:
        path = source.packaged_gguf()
    except InvalidInputError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    source.load(path).tokenizer.save(str(out))
    return out


def test_a_token_that_the_student_alone_would_not_have_chosen_is_marked(student: Student) -> None:
    free = next(iter(student.stream(ask("lamp"), Decoding(1))))
    assert not free.bent
    tokens = list(student.stream(ask("lamp"), Decoding(40, grammar=GRAMMARS[1], top_logprobs=1)))
    assert free.text != "{"
    assert tokens[0].forced
    assert tokens[0].bent
    for token in tokens:
        assert token.bent == (token.top[0][0] != token.id) or not token.forced
        assert token.top[0][1] >= token.logprob


def test_a_schema_that_cannot_guide_is_a_clear_error(student: Student) -> None:
    for schema in ({"type": "nonsense"}, {"type": "object", "properties": 3}, {"$ref": "#/no"}):
        with pytest.raises(GrammarError, match="cannot guide"):
            student.answer(ask("lamp"), Decoding(5, grammar=schema_grammar(schema)))
    assert student.answer(ask("lamp"), Decoding(5)).completion_tokens == 5


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"required": ["a"]}]},
        {"properties": {"a": {}}, "$ref": "#/$defs/x", "$defs": {"x": {"properties": {"b": {}}}}},
    ],
)
def test_schemas_that_combine_others_are_not_closed(schema: Json) -> None:
    assert closed(schema) == schema


def test_closing_looks_at_schemas_only() -> None:
    schema: Json = {
        "properties": {
            "properties": {"properties": {"enum": {"type": "integer"}}},
            "open": {"properties": {}, "additionalProperties": {"type": "string"}},
        },
        "const": {"properties": {"x": 1}},
    }
    made = closed(schema)
    assert made["additionalProperties"] is False
    assert made["properties"]["properties"]["additionalProperties"] is False
    assert made["properties"]["properties"]["properties"] == {"enum": {"type": "integer"}}
    assert made["properties"]["open"]["additionalProperties"] == {"type": "string"}
    assert made["const"] == {"properties": {"x": 1}}


PIECES = [
    "",
    '{"',
    "on",
    "off",
    '":"',
    "hall",
    " lamp",
    "porch",
    '"}',
    "itchen",
    *'abcdefghijklmnopqrstuvwxyz{} ":',
    " the",
]


def _spelled(text: str) -> list[int]:
    tokens: list[int] = []
    while text:
        piece = max((p for p in PIECES if p and text.startswith(p)), key=len)
        tokens.append(PIECES.index(piece))
        text = text[len(piece) :]
    return tokens


SPELLING = Spelling(PIECES.__getitem__, _spelled)


def test_a_guess_fills_the_shape_of_past_answers_with_words_of_the_request() -> None:
    past = PastAnswers(SPELLING)
    past.add("hall lamp please", _spelled('{"on":"hall lamp"}'))
    guesser = Guesser([], "kitchen lamp please", past)
    written: list[int] = []
    while (guess := guesser.guess(written)) is not None:
        written += guess.tokens
    assert written == _spelled('{"on":"kitchen lamp"}')


def test_the_words_of_a_request_decide_between_shapes() -> None:
    past = PastAnswers(SPELLING)
    for word in ("on", "off", "on", "off", "on"):
        past.add(f"hall {word}", _spelled(f'{{"{word}":"hall"}}'))
    opened = _spelled('{"')
    for word in ("off", "on"):
        guess = Guesser([], f"porch {word}", past).guess(opened)
        assert guess is not None
        assert guess.tokens == _spelled(word)
        assert 1 / 2 < guess.likely < 1


def test_words_that_were_never_copied_are_not_guessed() -> None:
    past = PastAnswers(SPELLING)
    for _ in range(2):
        past.add("the hall", _spelled('{"on":"hall"}'))
        past.add("the porch", _spelled('{"on":"porch"}'))
    guess = Guesser([], "the kitchen", past).guess(_spelled('{"on":"'))
    assert guess is not None
    assert guess.tokens == _spelled("kitchen")


def test_what_followed_in_the_prompt_is_guessed_where_no_answer_is_known() -> None:
    guesser = Guesser([3, 5, 6, 7, 3, 5], "", PastAnswers(SPELLING))
    assert guesser.guess([]) == Guess([6], 0.5)
    assert guesser.guess([6]) == Guess([7], 0.7)
    assert guesser.guess([9]) is None


@given(
    asked=st.lists(st.sampled_from(PIECES)).map("".join),
    answer=st.lists(st.integers(1, len(PIECES) - 1), max_size=80),
)
def test_a_shape_says_all_of_an_answer(asked: str, answer: list[int]) -> None:
    request = Request(asked)
    made = shape(request, answer, PIECES.__getitem__)
    runs, text = iter(made.runs), ""
    for symbol in made.symbols:
        if symbol > 0:
            text += PIECES[symbol]
        else:
            begin, end = next(runs)
            text += " " * (symbol == -2) + request.text[begin:end]
    assert text == "".join(PIECES[t] for t in answer)


def test_past_answers_are_bounded_and_different() -> None:
    past = PastAnswers(SPELLING, limit=3)
    for i in range(50):
        past.add(f"on {i % 5}", [i % 5 + 1, 7])
    assert list(past) == [("on 2", (3, 7)), ("on 3", (4, 7)), ("on 4", (5, 7))]
    assert len(past._follows) + len(past._beside) + len(past._words) < 60
    past.add("on " * 1000, [1] * 1000)
    asked, answer = list(past)[-1]
    assert len(asked) <= 256
    assert len(answer) <= 64


def test_guesses_are_seen_in_the_number_of_passes(student: Student, passes: list[int]) -> None:
    decoding = Decoding(40, grammar=GRAMMARS[2])
    first = student.answer(ask("say it"), decoding)
    passes.clear()
    assert student.answer(ask("say it"), decoding).text == first.text
    again = len(passes)
    passes.clear()
    student.answer(ask("say it"), replace(decoding, speculate=False))
    assert again < len(passes) / 2


def test_what_is_forced_at_the_end_of_an_answer_is_not_computed(
    student: Student, passes: list[int]
) -> None:
    either: Json = {"enum": ["yes, with all that follows from it", "no, and nothing follows"]}
    decoding = Decoding(80, grammar=schema_grammar(either))
    first = student.answer(ask("may it be?"), decoding)
    passes.clear()
    again = student.answer(ask("may it be?"), decoding)
    assert again.text == first.text
    assert passes == [2]  # the prompt's last token, and the quotation mark; then it is all said


def test_text_and_tokens_of_a_stop_text_are_the_same_with_guesses(student: Student) -> None:
    whole = student.answer(ask("turn the lamp on"), Decoding(max_tokens=30)).text
    stop = (whole[10:13],)
    tokens: list[list[Token]] = [
        list(student.stream(ask("turn the lamp on"), Decoding(30, stop=stop, speculate=ahead)))
        for ahead in (True, False)
    ]
    assert [t.text for t in tokens[0]] == [t.text for t in tokens[1]]
    assert "".join(t.text for t in tokens[0]) == whole[: whole.index(stop[0])]
