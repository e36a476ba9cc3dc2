"""A small HTTP server in SGLang's place, with a child process: what the soak's checks see when something is wrong."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mmtok_bench.server import SglangServer

__all__ = ["StubServer"]

# Answers every chat alike, and does wrong what its arguments say. Its child has "scheduler" in its command line.
_PROGRAM = r"""
import ctypes, json, os, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, wrongs = int(sys.argv[1]), set(sys.argv[2:])
die_with_parent = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(600)", "scheduler", str(port)],
    preexec_fn=None if "leaves its child" in wrongs else die_with_parent,
    start_new_session="leaves its child" in wrongs,
)
if "outlives its child" not in wrongs:
    threading.Thread(target=lambda: (child.wait(), os._exit(1)), daemon=True).start()
num_chats = 0

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *arguments): pass
    def say(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/health" and "blocks" in wrongs:
            time.sleep(0.4)
        self.say(200, {})
    def do_POST(self):
        global num_chats
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/flush_cache"):
            return self.say(400 if "keeps a request" in wrongs else 200, {})
        num_chats += 1
        if "dies" in wrongs and num_chats > 20:
            os._exit(1)
        logprob = -0.5 - (1e-5 if "drifts" in wrongs and num_chats > 20 else 0)
        token = {"token": "a", "bytes": [97], "logprob": logprob, "top_logprobs": []}
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "a"}}
        choice["logprobs"] = {"content": [token | {"top_logprobs": [token]}]}
        self.say(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "default", "choices": [choice]})

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class StubServer(SglangServer):
    """The stub as a server of the soak.

    Args:
        log_path: The file for its output.
        *wrongs: What it does wrong: "drifts", "dies" (both after twenty chats), "keeps a request", "blocks", "leaves
            its child", "outlives its child".
    """

    def __init__(self, log_path: Path, *wrongs: str) -> None:
        super().__init__("stub", *wrongs, log_path=log_path / f"{time.monotonic_ns()}.log", start_timeout_s=60)

    @property
    def command(self) -> list[str]:
        """The stub's command line."""
        return [sys.executable, "-c", _PROGRAM, str(self.port), *self.args]
