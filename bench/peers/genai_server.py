"""onnxruntime-genai behind a small HTTP server, in the peers' environment.

genai has no server of its own. This one does for it what a device's agent would: it keeps the last
request's generator and rewinds it to what the next prompt has in common with it, and lets genai's
guidance force tokens. It prints its address and serves until it is killed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import onnxruntime_genai as og

if TYPE_CHECKING:
    from collections.abc import Iterator


class Peer:
    """One model, one request at a time."""

    def __init__(self, folder: str, context: int) -> None:
        self._model = og.Model(folder)
        self._tokenizer = og.Tokenizer(self._model)
        self._context = context
        self._schema: str | None = None
        self._generator: Any = None
        self._known: list[int] = []
        self._shared = 0

    def answer(self, request: dict[str, Any], usage: dict[str, Any]) -> Iterator[str]:
        """Pieces of the answer; ``usage`` is filled with counts and timings (milliseconds)."""
        start = time.perf_counter()
        ids = [int(i) for i in self._tokenizer.encode(_render(request["messages"]))]
        generator = self._prepared(request, ids)
        stream = self._tokenizer.create_stream()
        first, limit = None, len(ids) + request.get("max_tokens", self._context)
        shown = len(ids)
        while not generator.is_done() and generator.token_count() < limit:
            generator.generate_next_token()
            first = first or time.perf_counter()
            sequence = generator.get_sequence(0)
            for token in sequence[shown:limit]:
                yield stream.decode(token)
            shown = len(sequence)
        end = time.perf_counter()
        self._known = [int(i) for i in generator.get_sequence(0)]
        count = min(shown, limit) - len(ids)
        usage |= {"prompt_tokens": len(ids), "completion_tokens": count}
        usage["prompt_n"] = len(ids) - self._shared
        usage["prompt_ms"] = 1000 * ((first or end) - start)
        usage["predicted_ms"] = 1000 * (end - (first or end))
        usage["predicted_per_second"] = 1000 * (count - 1) / max(usage["predicted_ms"], 1e-3)

    def _prepared(self, request: dict[str, Any], ids: list[int]) -> Any:  # noqa: ANN401
        given = request.get("response_format") or {}
        schema = json.dumps(given["json_schema"]["schema"]) if given else None
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._known, ids[:-1], strict=False))
        shared = len(list(same))
        endless = request.get("ignore_eos", False)
        if self._generator is None or schema != self._schema or not shared or endless:
            params = og.GeneratorParams(self._model)
            least = len(ids) + request["max_tokens"] if endless else 0
            params.set_search_options(max_length=self._context, min_length=least, do_sample=False)
            if schema:
                params.set_guidance("json_schema", schema, enable_ff_tokens=True)
            self._generator, self._schema, shared = og.Generator(self._model, params), schema, 0
        else:
            self._generator.rewind_to(shared)
        self._known, self._shared = [], shared
        self._generator.append_tokens(ids[shared:])
        return self._generator


def _render(messages: list[dict[str, str]]) -> str:
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n"


class Handler(BaseHTTPRequestHandler):
    """``POST /v1/chat/completions``, whole or as server-sent events."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    peer: Peer

    def do_POST(self) -> None:
        """Answer."""
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        usage: dict[str, Any] = {}
        pieces = self.peer.answer(request, usage)
        if request.get("stream"):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            for piece in pieces:
                self._event({"choices": [{"delta": {"content": piece}}]})
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True
            return
        message = {"role": "assistant", "content": "".join(pieces)}
        body = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder with genai_config.json")
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    Handler.peer = Peer(options.model, options.context)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
