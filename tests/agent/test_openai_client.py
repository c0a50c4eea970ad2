"""OpenAI's own client against a device with a real (tiny) student, over a socket."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, cast

import openai
import pytest

from edge.student.runtime import Student
from protos.prompt import Message
from protos.tools import Tool, call_text, with_tools

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.agent.scripted_student import Device, ScriptedStudent
    from tests.agent.test_api_socket import Eventually, Steps, served
else:
    from scripted_student import Device, ScriptedStudent
    from test_api_socket import Eventually, Steps, served

Json = dict[str, Any]
ASK = [{"role": "user", "content": "lamp on"}]
PARAMETERS: Json = {
    "type": "object",
    "properties": {"area": {"enum": ["hall", "den"]}, "level": {"type": "integer"}},
    "required": ["area"],
}
LAMP: Json = {
    "type": "function",
    "function": {"name": "lamp", "description": "Switch a lamp.", "parameters": PARAMETERS},
}
FAN: Json = {"type": "function", "function": {"name": "fan", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def url(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("device")

    def make() -> Device:
        student = Student.open(tiny_student / "bundle", threads=1)
        return Device(folder, cast("ScriptedStudent", student))

    with served(make) as (_, base):
        yield base


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def create(client: openai.OpenAI, **fields: Any) -> Any:  # noqa: ANN401 - whatever a client gives
    messages = fields.pop("messages", ASK)
    loose = cast("Any", client)  # requests are plain dictionaries here
    return loose.chat.completions.create(model="anabranch", messages=messages, **fields)


def collect(chunks: Any) -> Json:  # noqa: ANN401 - whatever a client gives
    """A streamed answer, put together."""
    whole: Json = {"content": "", "calls": [], "logprobs": [], "reason": None, "usage": None}
    for chunk in chunks:
        whole["usage"] = chunk.usage or whole["usage"]
        for choice in chunk.choices:
            whole["content"] += choice.delta.content or ""
            whole["reason"] = choice.finish_reason or whole["reason"]
            whole["logprobs"] += choice.logprobs.content if choice.logprobs else []
            for call in choice.delta.tool_calls or []:
                if call.id:
                    whole["calls"].append([call.function.name, ""])
                whole["calls"][-1][1] += call.function.arguments
    return whole


def test_a_plain_answer_and_its_stream_are_the_same(client: openai.OpenAI) -> None:
    answer = create(client, max_completion_tokens=9)
    chunks = create(
        client, max_completion_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    streamed = collect(chunks)
    (choice,) = answer.choices
    assert choice.message.content == streamed["content"]
    assert choice.finish_reason == streamed["reason"] == "length"
    assert answer.usage == streamed["usage"]
    assert answer.usage.completion_tokens == 9
    assert choice.message.tool_calls is None
    assert [m.id for m in client.models.list()] == ["anabranch"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_obeyed(client: openai.OpenAI, stream: bool) -> None:
    schema = {"name": "x", "strict": True, "schema": PARAMETERS}
    fields: Json = {
        "response_format": {"type": "json_schema", "json_schema": schema},
        "max_tokens": 200,
        "temperature": 1.0,
        "seed": 3,
    }
    answer = create(client, **fields)
    content = answer.choices[0].message.content
    if stream:
        assert collect(create(client, stream=True, **fields))["content"] == content
    assert json.loads(content)["area"] in {"hall", "den"}
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 200


def test_a_json_object_is_json_as_far_as_it_goes(client: openai.OpenAI) -> None:
    answer = create(client, response_format={"type": "json_object"}, max_tokens=20)
    assert answer.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"lamp", "fan"}),
        ({"type": "function", "function": {"name": "fan"}}, {"fan"}),
    ],
)
def test_a_tool_that_must_be_called_is_called(
    client: openai.OpenAI, choice: object, names: set[str], stream: bool
) -> None:
    fields: Json = {"tools": [LAMP, FAN], "tool_choice": choice, "max_tokens": 200}
    if stream:
        streamed = collect(create(client, stream=True, **fields))
        ((name, arguments),) = streamed["calls"]
        assert streamed["content"] == ""
        assert streamed["reason"] == "tool_calls"
    else:
        (given,) = create(client, **fields).choices
        assert given.finish_reason == "tool_calls"
        assert given.message.content is None
        (call,) = given.message.tool_calls
        assert call.type == "function"
        assert call.id.startswith("call_")
        name, arguments = call.function.name, call.function.arguments
    assert name in names
    assert json.loads(arguments)["area"] in {"hall", "den"}


def test_a_tool_that_may_be_called_leaves_text_free(client: openai.OpenAI) -> None:
    (given,) = create(client, tools=[LAMP], max_tokens=12).choices
    assert given.message.tool_calls is None or given.finish_reason == "length"
    (none,) = create(client, tools=[LAMP], tool_choice="none", max_tokens=12).choices
    (bare,) = create(client, max_tokens=12).choices
    assert none.message.content == bare.message.content  # the tools were not even shown


def test_a_call_that_was_cut_says_so(client: openai.OpenAI) -> None:
    fields: Json = {"tools": [LAMP], "tool_choice": "required", "max_tokens": 34}
    (given,) = create(client, **fields).choices
    assert given.finish_reason == "length"
    assert given.message.tool_calls[0].function.arguments == '{"area"'


def test_the_history_of_a_tool_call_goes_on(client: openai.OpenAI) -> None:
    call = {
        "id": "call_7",
        "type": "function",
        "function": {"name": "lamp", "arguments": '{"area": "hall"}'},
    }
    history: list[Json] = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_7", "content": "done"},
    ]
    assert create(client, messages=history, tools=[LAMP]).choices[0].message
    history[-1]["tool_call_id"] = "call_8"
    with pytest.raises(openai.BadRequestError, match="tool_call_id"):
        create(client, messages=history, tools=[LAMP])


def test_what_stands_in_the_prompt_is_what_protos_says(tmp_path: Path) -> None:
    student = ScriptedStudent(context_length=500)
    history = [
        *ASK,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c", "function": {"name": "lamp", "arguments": '{"area": "hall"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    with served(lambda: Device(tmp_path, student)) as (device, base):
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as made:
            create(made, messages=history, tools=[LAMP])
        assert device.drift.answers == 0  # another use than the harness's
    messages = [
        Message("user", "lamp on"),
        Message("assistant", call_text("lamp", {"area": "hall"})),
        Message("tool", "done"),
    ]
    tool = Tool("lamp", "Switch a lamp.", PARAMETERS)
    assert student.prompts == [with_tools(messages, "You run a home.", [tool])]


@pytest.mark.parametrize("guided", [False, True])
def test_log_probabilities_cover_every_token(client: openai.OpenAI, guided: bool) -> None:
    fields: Json = {"logprobs": True, "top_logprobs": 3, "max_tokens": 30}
    if guided:
        schema = {"name": "x", "schema": PARAMETERS}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    answer = create(client, **fields)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    spelled = b"".join(bytes(e.bytes) for e in entries)
    content = answer.choices[0].message.content
    broken = "\N{REPLACEMENT CHARACTER}"  # decoders differ in how many of them broken bytes become
    assert spelled.decode(errors="replace").replace(broken, "") == content.replace(broken, "")
    for entry in entries:
        likelihoods = [t.logprob for t in entry.top_logprobs]
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert len(likelihoods) == 3
        assert sum(map(math.exp, likelihoods)) <= 1.0001
        assert entry.logprob <= likelihoods[0]
    if not guided:
        assert all(e.logprob == e.top_logprobs[0].logprob for e in entries)
    streamed = collect(create(client, stream=True, **fields))
    assert streamed["logprobs"] == entries


def test_a_seed_makes_sampling_repeatable(client: openai.OpenAI) -> None:
    texts = [
        create(client, temperature=1.0, seed=seed, max_tokens=12).choices[0].message.content
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_stop_ends_an_answer_before_it(client: openai.OpenAI) -> None:
    whole = create(client, max_tokens=30).choices[0].message.content
    stop = whole[4:6]
    (given,) = create(client, max_tokens=30, stop=[stop]).choices
    assert given.message.content == whole[: whole.index(stop)]
    assert given.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "unevaluatedProperties": False}}}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {
            "$ref": "#/nowhere"}}}]}, "tools"),
        ({"max_tokens": 100_000}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_the_client_s_bad_request(
    client: openai.OpenAI, fields: Json, param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, stream=stream, **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code


def test_a_full_queue_is_a_rate_limit(tmp_path: Path, eventually: Eventually) -> None:
    import threading

    steps = Steps()
    student = ScriptedStudent(reply=lambda _: "one two", pause=steps.wait)
    with (
        served(lambda: Device(tmp_path, student, max_live=1, max_waiting=1)) as (device, base),
        openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as made,
    ):
        asking = [threading.Thread(target=create, args=(made,)) for _ in range(2)]
        for thread in asking:
            thread.start()
        eventually(lambda: device.host.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            create(made)
        assert caught.value.code == "device_busy"
        steps.allow(4)
        for thread in asking:
            thread.join(20)
    assert student.decoded == 4


def test_requests_at_once_are_answered_as_they_are_alone(client: openai.OpenAI) -> None:
    from concurrent.futures import ThreadPoolExecutor

    texts = ["lamp on", "lamp off", "the hall", "something longer than the others, by far"]

    def ask(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return str(create(client, messages=messages, max_tokens=25).choices[0].message.content)

    alone = [ask(t) for t in texts]
    with ThreadPoolExecutor(4) as people:
        for _ in range(3):
            assert list(people.map(ask, texts)) == alone
