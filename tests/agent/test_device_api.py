"""The HTTP API through ASGI: real memory, outbox and drift monitor, a scripted student."""

from __future__ import annotations

import asyncio
import errno
import json
import uuid
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from edge.link.outbox import MAX_PAYLOAD
from edge.memory.store import Memory
from protos.harness import Harness
from protos.prompt import Message
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from tests.agent.scripted_student import Device, ScriptedStudent
else:
    from scripted_student import Device, ScriptedStudent

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
FEEDBACK = "/v1/feedback"


def user(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def with_client(
    device: Device, talk: Callable[[httpx.AsyncClient], Coroutine[None, None, None]]
) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app=device.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://device") as client:
            await talk(client)

    asyncio.run(run())


async def ask(client: httpx.AsyncClient, text: str, **fields: object) -> Json:
    response = await client.post(CHAT, json={"messages": user(text), **fields})
    assert response.status_code == 200, response.text
    body: Json = response.json()
    return body


async def correct(client: httpx.AsyncClient, answer: Json, correction: str) -> str:
    body = {"completion_id": answer["id"], "correction": correction}
    response = await client.post(FEEDBACK, json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["demonstration_id"])


def test_a_completion_has_openai_s_shape(tmp_path: Path) -> None:
    device = Device(tmp_path, ScriptedStudent(reply=lambda _: "one two three"))

    async def talk(client: httpx.AsyncClient) -> None:
        body = await ask(client, "count")
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        assert body["created"] == 1_800_000_000
        assert body["model"] == "anabranch"
        assert body["system_fingerprint"] == "a" * 64
        (choice,) = body["choices"]
        assert choice["message"] == {
            "role": "assistant",
            "content": "one two three",
            "refusal": None,
        }
        assert choice["finish_reason"] == "stop"
        assert body["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
        }

    with_client(device, talk)
    assert device.value("anabranch_requests_total", outcome="ok") == 1
    assert device.value("anabranch_answer_tokens_total") == 3
    assert device.value("anabranch_request_seconds_count") == 1


def test_the_harness_rules_where_the_request_is_silent(tmp_path: Path) -> None:
    student = ScriptedStudent(
        reply=lambda _: "a b c d", harness=Harness(system="Be brief.", max_tokens=2)
    )
    device = Device(tmp_path, student)

    async def talk(client: httpx.AsyncClient) -> None:
        body = await ask(client, "hello")
        assert body["choices"][0]["message"]["content"] == "a b"
        assert body["choices"][0]["finish_reason"] == "length"
        own = [{"role": "system", "content": "Be long."}, *user("hello")]
        await client.post(CHAT, json={"messages": own})
        parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        developer = [
            {"role": "developer", "content": "Be odd."},
            {"role": "user", "content": parts},
        ]
        await client.post(CHAT, json={"messages": developer})

    with_client(device, talk)
    first, second, third = student.prompts
    assert first == [Message("system", "Be brief."), Message("user", "hello")]
    assert second == [Message("system", "Be long."), Message("user", "hello")]
    assert third == [Message("system", "Be odd."), Message("user", "hello")]
    assert student.decodings[0].temperature == 0


def test_decoding_settings_reach_the_student(tmp_path: Path) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        await ask(client, "x", max_completion_tokens=7, temperature=0.5, seed=-1, stop="\n")
        await ask(client, "x", max_tokens=3, stop=["a", "b"], n=1, user="ignored")

    with_client(device, talk)
    one, two = device.student.decodings
    assert (one.max_tokens, one.temperature, one.stop) == (7, 0.5, ("\n",))
    assert one.seed is not None
    assert one.seed >= 0
    assert (two.max_tokens, two.seed, two.stop) == (3, None, ("a", "b"))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[1]", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
        (b"{}", "messages"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": "hi"}', "messages"),
        (b'{"messages": ["hi"]}', "messages[0]"),
        (b'{"messages": [{"content": "hi"}]}', "messages[0].role"),
        (b'{"messages": [{"role": "tool", "content": "hi"}]}', "messages[0]"),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": [{"type": "x"}]}]}', "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": "<|im_end|>"}]}', "messages[0]"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0]"),
        (b'{"messages": [{"role": "assistant", "content": "hi"}]}', "messages"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_in_openai_s_shape(
    tmp_path: Path, body: bytes, param: str | None
) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        headers = {"content-type": "application/json"}
        response = await client.post(CHAT, content=body, headers=headers)
        assert response.status_code == 400
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert error["message"]

    with_client(device, talk)
    assert device.value("anabranch_requests_total", outcome="invalid") == 1
    assert not device.student.prompts


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", "1"),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", 3),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("seed", "x"),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", [""]),
        ("stop", 5),
        ("stream", "yes"),
        ("store", 1),
        ("functions", [{"name": "x"}]),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "function": {"name": "two words"}}]),
        ("tools", [{"type": "function", "function": {"name": "x", "parameters": {"type": 5}}}]),
        ("tools", [{"type": "function", "function": {"name": "x", "description": "<|im_end|>"}}]),
        ("tools", [{"type": "function", "function": {"name": "x"}}] * 2),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "x"}}),
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}),
        ("logprobs", 1),
        ("top_logprobs", 2),
        ("max_completion_tokens", 201),
    ],
)
def test_a_field_out_of_bounds_is_named(tmp_path: Path, field: str, value: object) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        response = await client.post(CHAT, json={"messages": user("hi"), field: value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
        assert field in response.json()["error"]["message"]

    with_client(device, talk)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        for stream in (False, True):
            body = {"messages": user("word " * 300), "stream": stream}
            response = await client.post(CHAT, json=body)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "context_length_exceeded"
        await ask(client, "a short one still works")

    with_client(device, talk)


def test_large_bodies_and_other_content_types_are_refused(tmp_path: Path) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        large = await client.post(CHAT, json={"messages": user("x" * (1024 * 1024))})
        assert large.status_code == 413
        form = await client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
        assert form.status_code == 415
        assert "application/json" in form.json()["error"]["message"]
        assert (await client.get("/v1/nothing")).json()["error"]["code"] == "unknown_url"
        assert (await client.get(CHAT)).status_code == 405

    with_client(device, talk)


def events(text: str) -> list[str]:
    assert text.endswith("\n\n")
    return [line.removeprefix("data: ") for line in text.strip().split("\n\n")]


def test_a_stream_has_openai_s_shape(tmp_path: Path) -> None:
    device = Device(tmp_path, ScriptedStudent(reply=lambda _: "one two three"))

    async def talk(client: httpx.AsyncClient) -> None:
        body = {
            "messages": user("count"),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        response = await client.post(CHAT, json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = events(response.text)
        assert done == "[DONE]"
        parsed = [json.loads(c) for c in chunks]
        assert {c["object"] for c in parsed} == {"chat.completion.chunk"}
        assert len({c["id"] for c in parsed}) == 1
        *answer, usage = parsed
        deltas = [c["choices"][0]["delta"] for c in answer]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(d.get("content", "") for d in deltas) == "one two three"
        assert [c["choices"][0]["finish_reason"] for c in answer][-2:] == [None, "stop"]
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 3
        assert await correct(client, answer[0], "four")

    with_client(device, talk)


def test_a_student_that_breaks_costs_one_request_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken_at = iter([0, 1, 1, 1])  # the second word of one answer, the first of two

    def pause() -> None:
        if next(broken_at, 0):
            message = "the runtime broke"
            raise RuntimeError(message)

    device = Device(tmp_path, ScriptedStudent(reply=lambda _: "one two", pause=pause))

    async def talk(client: httpx.AsyncClient) -> None:
        late = await client.post(CHAT, json={"messages": user("hi"), "stream": True})
        assert late.status_code == 200
        assert json.loads(events(late.text)[-1])["error"]["type"] == "server_error"
        for stream in (False, True):
            response = await client.post(CHAT, json={"messages": user("hi"), "stream": stream})
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"
        await ask(client, "hi")

    with_client(device, talk)
    assert "the runtime broke" in caplog.text
    assert device.value("anabranch_requests_total", outcome="failed") == 3


def test_a_correction_is_used_at_once_and_waits_for_the_cloud(tmp_path: Path) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        before = await ask(client, "play some jazz")
        assert before["choices"][0]["message"]["content"] == "I do not know"
        identity = await correct(client, before, '{"name":"play"}')
        after = await ask(client, "please play some jazz")
        assert after["choices"][0]["message"]["content"] == '{"name":"play"}'

        (evidence,) = device.demonstrations()
        assert evidence.id == identity
        assert uuid.UUID(identity).version == 7
        assert (evidence.channel, evidence.device) == ("home", "kitchen-1")
        assert evidence.student == "a" * 64
        assert evidence.created_ms == 1_800_000_000_000
        assert [(m.role, m.content) for m in evidence.messages] == [("user", "play some jazz")]
        assert evidence.answer == "I do not know"
        assert evidence.correction == '{"name":"play"}'
        assert evidence.source == device_pb2.SOURCE_CORRECTION
        assert evidence.signals.surprise == 0.25
        assert evidence.signals.corrected

    with_client(device, talk)
    assert device.woken
    assert device.value("anabranch_feedback_total", source="correction") == 1


def test_an_accepted_answer_is_evidence_too(tmp_path: Path) -> None:
    device = Device(tmp_path, ScriptedStudent(reply=lambda _: "on"))

    async def talk(client: httpx.AsyncClient) -> None:
        answer = await ask(client, "lamp on")
        body = {"completion_id": answer["id"], "accepted": True}
        assert (await client.post(FEEDBACK, json=body)).status_code == 200
        same = {"completion_id": answer["id"], "correction": "on"}
        assert (await client.post(FEEDBACK, json=same)).status_code == 200

    with_client(device, talk)
    (evidence,) = device.demonstrations()
    assert evidence.source == device_pb2.SOURCE_CONFIRMATION
    assert evidence.correction == evidence.answer == "on"
    assert not evidence.signals.corrected


def test_the_same_feedback_twice_is_one_demonstration(tmp_path: Path) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        answer = await ask(client, "lamp on")
        both = await asyncio.gather(*(correct(client, answer, "on") for _ in range(5)))
        assert len(set(both)) == 1
        other = await correct(client, answer, "off")
        assert other not in both
        assert (await ask(client, "lamp on"))["choices"][0]["message"]["content"] == "off"
        assert await correct(client, answer, "on") not in (*both, other)
        assert (await ask(client, "lamp on"))["choices"][0]["message"]["content"] == "on"

    with_client(device, talk)
    # A mind that was changed back is news to the cloud, which takes the newest.
    assert [d.correction for d in device.demonstrations()] == ["on", "off", "on"]
    assert device.memory.size == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"completion_id": "chatcmpl-none", "correction": "x"}, 404),
        ({"correction": "x"}, 400),
        ({"completion_id": "ID"}, 400),
        ({"completion_id": "ID", "correction": "x", "accepted": True}, 400),
        ({"completion_id": "ID", "accepted": False}, 400),
        ({"completion_id": "ID", "correction": "  "}, 400),
        ({"completion_id": "ID", "correction": "<|im_end|>"}, 400),
        ({"completion_id": "ID", "correction": 5}, 400),
        ({"completion_id": "ID", "correction": "x" * MAX_PAYLOAD}, 413),
    ],
)
def test_feedback_that_cannot_be_kept_is_refused(tmp_path: Path, body: Json, status: int) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        answer = await ask(client, "lamp on")
        filled = {k: answer["id"] if v == "ID" else v for k, v in body.items()}
        response = await client.post(FEEDBACK, json=filled)
        assert response.status_code == status
        assert response.json()["error"]["message"]

    with_client(device, talk)
    assert not device.demonstrations()
    assert device.memory.size == 0


def test_a_full_disk_refuses_feedback_and_changes_nothing(tmp_path: Path) -> None:
    device = Device(tmp_path)
    # The real thing: SQLite may not grow the file by one page.
    pages = device.outbox._db.execute("PRAGMA page_count").fetchone()[0]
    device.outbox._db.execute(f"PRAGMA max_page_count={pages}")

    async def talk(client: httpx.AsyncClient) -> None:
        answer = await ask(client, "lamp on")
        body = {"completion_id": answer["id"], "correction": "on " * 5000}
        response = await client.post(FEEDBACK, json=body)
        assert response.status_code == 507
        assert response.json()["error"]["type"] == "insufficient_storage"
        assert device.memory.size == 0
        assert not device.demonstrations()
        device.outbox._db.execute("PRAGMA max_page_count=1000000")
        assert (await client.post(FEEDBACK, json=body)).status_code == 200
        assert device.memory.size == 1

    with_client(device, talk)


def test_demonstrations_that_do_not_fit_are_dropped_farthest_first(tmp_path: Path) -> None:
    student = ScriptedStudent(
        reply=lambda _: "never",
        context_length=40,
        harness=Harness(system="", max_tokens=20, memory_shown=3, memory_similarity=0.1),
    )
    device = Device(tmp_path, student)

    async def talk(client: httpx.AsyncClient) -> None:
        for text in ("turn on the red lamp", "turn on the green lamp", "sing me a red song"):
            answer = await ask(client, text)
            await correct(client, answer, "now")
        student.prompts.clear()
        await ask(client, "turn on the red lamps")

    with_client(device, talk)
    (prompt,) = student.prompts
    asked = [m.content for m in prompt if m.role == "user"]
    assert asked == ["turn on the green lamp", "turn on the red lamp", "turn on the red lamps"]


def test_what_is_merely_similar_is_shown_only_after_a_drift_alarm(tmp_path: Path) -> None:
    student = ScriptedStudent(reply=lambda _: "wrong", harness=Harness(system="", max_tokens=20))
    device = Device(tmp_path, student)

    async def shown(client: httpx.AsyncClient) -> list[str]:
        student.prompts.clear()
        await ask(client, "turn off the light in the hall")
        return [m.content for m in student.prompts[0] if m.role == "user"][:-1]

    async def talk(client: httpx.AsyncClient) -> None:
        await correct(client, await ask(client, "turn on the red lamp in the den"), "right")
        assert await shown(client) == []
        for i in range(40):
            await correct(client, await ask(client, f"{i}"), f"right {i}")
        assert (await client.get("/healthz")).json()["drift"]["alarms"] == 1
        assert await shown(client) == ["turn on the red lamp in the den"]
        device.drift.swapped()
        assert await shown(client) == []

    with_client(device, talk)


def test_constant_corrections_raise_one_alarm_of_kind_concept(tmp_path: Path) -> None:
    device = Device(tmp_path, ScriptedStudent(reply=lambda _: "wrong"))

    async def talk(client: httpx.AsyncClient) -> None:
        for i in range(60):
            await correct(client, await ask(client, f"command {i}"), f"right {i}")
        health = (await client.get("/healthz")).json()
        assert health["drift"]["alarms"] == 1
        assert health["drift"]["alarms_by_kind"]["concept"] == 1
        assert health["drift"]["signals"]["correction"]["alarmed"]
        assert health["outbox"]["waiting"] == 61

    with_client(device, talk)
    (report,) = device.drift_reports()
    assert report.kind == device_pb2.DRIFT_KIND_CONCEPT
    assert report.student == "a" * 64
    assert report.answered <= 20
    assert {s.name for s in report.signals} == {"surprise", "schema", "correction"}
    assert device.value("anabranch_drift_alarms_total", kind="concept") == 1
    assert device.value("anabranch_drift_signal", signal="correction") == 1


def test_an_alarm_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path, ScriptedStudent(reply=lambda _: "wrong"))
    put = device.outbox.put

    def full(kind: str, item_id: str, payload: bytes) -> bool:
        if kind == "drift":
            from protos.errors import StorageError

            raise StorageError(str(OSError(errno.ENOSPC, "No space left on device")))
        return put(kind, item_id, payload)

    async def talk(client: httpx.AsyncClient) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(device.outbox, "put", full)
            for i in range(30):
                await correct(client, await ask(client, f"command {i}"), "right")
        assert not device.drift_reports()
        await ask(client, "one more")
        assert len(device.drift_reports()) == 1

    with_client(device, talk)


def test_answers_that_are_not_to_be_stored_do_not_count_for_drift(tmp_path: Path) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        for i in range(40):
            answer = await ask(client, f"command {i}", store=False)
            await correct(client, answer, "right")
        own = [{"role": "system", "content": "Translate."}, *user("hello")]
        await client.post(CHAT, json={"messages": own})

    with_client(device, talk)
    assert device.drift.answers == 0
    assert not device.drift_reports()
    assert len(device.demonstrations()) == 40


def test_after_a_swap_drift_is_watched_from_the_start(tmp_path: Path) -> None:
    device = Device(tmp_path, ScriptedStudent(reply=lambda _: "wrong"))

    async def talk(client: httpx.AsyncClient) -> None:
        for i in range(30):
            last = await ask(client, f"command {i}")
            await correct(client, last, "right")
        late = await ask(client, "the last one")
        await device.host.swap(ScriptedStudent(digest="b" * 64, reply=lambda _: "right"))
        device.assistant.swapped()
        await correct(client, late, "right")
        assert device.drift.answers == 0
        for i in range(30):
            await correct(client, await ask(client, f"new {i}"), "other")

    with_client(device, talk)
    first, second = device.drift_reports()
    assert (first.student, second.student) == ("a" * 64, "b" * 64)
    assert device.demonstrations()[30].student == "a" * 64


def test_health_and_models_say_what_serves(tmp_path: Path) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        health = (await client.get("/healthz")).json()
        assert health["status"] == "ok"
        assert (health["channel"], health["device"]) == ("home", "kitchen-1")
        assert health["student"] == "a" * 64
        assert health["memory"] == {"demonstrations": 0}
        assert health["outbox"] == {"waiting": 0, "rejected": 0, "bytes": 0}
        models = (await client.get("/v1/models")).json()
        assert models["object"] == "list"
        assert models["data"][0]["id"] == "anabranch"

    with_client(device, talk)


def test_working_memory_comes_back_after_a_restart(tmp_path: Path) -> None:
    device = Device(tmp_path)

    async def talk(client: httpx.AsyncClient) -> None:
        await correct(client, await ask(client, "lamp on"), "on")

    with_client(device, talk)
    again = Memory(path=tmp_path / "memory.sqlite")
    (shown,) = again.nearest([Message("user", "lamp on")], limit=3, min_similarity=0.5)
    assert shown.answer == "on"
