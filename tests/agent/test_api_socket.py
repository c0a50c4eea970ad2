"""The API over a real socket: streams arrive in pieces, hang-ups stop the student."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import uvicorn

if TYPE_CHECKING:
    from pathlib import Path

    from tests.agent.scripted_student import Device, ScriptedStudent
else:
    from scripted_student import Device, ScriptedStudent

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
Eventually = Callable[[Callable[[], object]], None]


@contextmanager
def served(make: Callable[[], Device]) -> Iterator[tuple[Device, str]]:
    """Run a device's app with uvicorn in a thread; gives its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready: list[tuple[Device, uvicorn.Server]] = []

    def run() -> None:
        device = make()
        config = uvicorn.Config(device.app, log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        ready.append((device, server))
        server.run(sockets=[listener])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not ready:
        time.sleep(0.005)
    device, server = ready[0]
    try:
        yield device, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class Steps:
    """Lets a student decode one word at a time."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)

    def wait(self) -> None:
        assert self._allowed.acquire(timeout=20)

    def allow(self, words: int) -> None:
        self._allowed.release(words)


def test_a_stream_arrives_word_by_word(tmp_path: Path) -> None:
    steps = Steps()
    student = ScriptedStudent(reply=lambda _: "one two three", pause=steps.wait)
    with served(lambda: Device(tmp_path, student)) as (_, url):
        steps.allow(1)
        with httpx.stream("POST", url + CHAT, json={**BODY, "stream": True}) as response:
            lines = (line for line in response.iter_lines() if line)
            seen = []
            for line in lines:
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    break
                delta = json.loads(data)["choices"][0]["delta"]
                if delta.get("content"):
                    seen.append(delta["content"])
                    steps.allow(1)  # the next word is decoded only after this one was read
            assert seen == ["one", " two", " three"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_its_decoding(
    tmp_path: Path,
    eventually: Eventually,
    stream: bool,
) -> None:
    steps = Steps()
    student = ScriptedStudent(reply=lambda _: "word " * 40, pause=steps.wait)
    with served(lambda: Device(tmp_path, student)) as (device, url):
        port = int(url.rpartition(":")[2])
        body = json.dumps({**BODY, "stream": stream}).encode()
        request = (
            f"POST {CHAT} HTTP/1.1\r\nHost: device\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request.encode() + body)
            steps.allow(2)
            eventually(lambda: student.decoded == 2)
        eventually(lambda: device.value("anabranch_requests_total", outcome="abandoned") == 1)
        steps.allow(1)  # the word that was under way
        answer = threading.Thread(
            target=lambda: httpx.post(url + CHAT, json={**BODY, "max_tokens": 5}, timeout=20)
        )
        answer.start()
        steps.allow(5)
        answer.join(20)
        assert not answer.is_alive()
        assert student.decoded <= 3 + 5
        assert device.drift.answers == 1


def test_a_client_that_does_not_read_its_stream_keeps_nobody_waiting(tmp_path: Path) -> None:
    long = "x" * 20_000
    student = ScriptedStudent(reply=lambda _: " ".join([long] * 100), context_length=10_000)
    body = {**BODY, "stream": True, "max_tokens": 100}
    with (
        served(lambda: Device(tmp_path, student)) as (_, url),
        httpx.stream("POST", url + CHAT, json=body, timeout=20) as unread,
    ):
        assert unread.status_code == 200
        other = httpx.post(url + CHAT, json={**BODY, "max_tokens": 1}, timeout=20)
        assert other.status_code == 200


def test_a_body_that_is_too_large_is_answered_over_a_socket_too(tmp_path: Path) -> None:
    with served(lambda: Device(tmp_path)) as (_, url):
        for size in (1 << 20, 5 << 20):
            body = {"messages": [{"role": "user", "content": "x" * size}]}
            response = httpx.post(url + CHAT, json=body, timeout=20)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        assert httpx.post(url + CHAT, json=BODY).status_code == 200


def test_a_request_in_flight_is_finished_when_the_server_stops(tmp_path: Path) -> None:
    steps = Steps()
    student = ScriptedStudent(reply=lambda _: "one two three", pause=steps.wait)
    answers: list[httpx.Response] = []
    with served(lambda: Device(tmp_path, student)) as (_, url):
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(url + CHAT, json=BODY, timeout=20))
        )
        asking.start()
        while not student.prompts:
            time.sleep(0.005)
        threading.Timer(0.3, steps.allow, [3]).start()
    asking.join(20)
    assert answers[0].json()["choices"][0]["message"]["content"] == "one two three"
