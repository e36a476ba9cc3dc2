"""A server of chat completions, streamed or not, that knows no model: for what happens on this side of HTTP."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]

TOKENS = {"all": 196, "50%": 98, "25%": 49, "4": 4}


def question_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][1]["text"])


def budget_of(body: dict[str, Any]) -> str:
    return str(body["mm_processor_kwargs"]["mmtok_budget"])


def completion(text: str | None, num_image_tokens: int) -> dict[str, Any]:
    return {
        "id": "0",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "default",
        "choices": [{"index": 0, "finish_reason": "length", "delta": {"role": "assistant", "content": text}}],
        "usage": {
            "prompt_tokens": 12 + num_image_tokens,
            "completion_tokens": 1,
            "total_tokens": 13 + num_image_tokens,
            "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": num_image_tokens},
        },
    }


def says(text: str) -> Reply:
    return lambda body: (200, completion(text, TOKENS[budget_of(body)]))


class _Server(ThreadingHTTPServer):
    # As many connections at once as the tests ask for: the default of 5 turns some away.
    request_queue_size = 64


@contextlib.contextmanager
def serving(reply: Reply, info: dict[str, Any] | None = None) -> Iterator[str]:
    """Gives the address of a server that answers chat requests by `reply`, and /server_info with `info`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, answer = reply(body)
            if status != 200:
                self._send(status, json.dumps(answer), "application/json")
                return
            if not body.get("stream"):
                choices = [{**each, "message": each["delta"]} for each in answer["choices"]]
                whole = {**answer, "object": "chat.completion", "choices": choices}
                self._send(200, json.dumps(whole), "application/json")
                return
            # SGLang sends the usage in a piece of its own, without choices.
            pieces = [{**answer, "usage": None}, {**answer, "choices": []}]
            events = [*map(json.dumps, pieces), "[DONE]"]
            self._send(200, "".join(f"data: {event}\n\n" for event in events), "text/event-stream")

        def do_GET(self) -> None:
            self._send(200, json.dumps(info or {}), "application/json")

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def _send(self, status: int, said: str, kind: str) -> None:
            text = said.encode()
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            # A client that gave up the others after a failed request is what some tests are about.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(text)

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
