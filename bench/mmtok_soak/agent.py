"""Faults of the agent: redirects, endless or invalid answers, delays, resets, and a server that is its own agent."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mmtok_bench.server import ServerError, SglangServer
from mmtok_soak.fixed_chats import TOLERANCE, ask_for_logprobs, chat_body, largest_difference, small_image
from mmtok_soak.trial import Served, Trial, make_soak_server, resident_bytes, send

__all__ = ["MODES", "TIMEOUT_MS", "Agent", "abuse_the_agent", "agent_itself"]

TIMEOUT_MS = 2000
MODES = (
    "redirect 302",
    "redirect 308",
    "endless body",
    "gzip bomb",
    "deep JSON",
    "no JSON",
    "HTTP 500",
    "slow",
    "drip",
    "reset",
)
_MAX_GROWTH_BYTES = 256 << 20
_MAX_SENT_BYTES = 8 << 20
_AWAKE_WITHIN_S = 60.0
_ENDLESS = b" " * (64 << 10)


class Agent:
    """A local endpoint that answers as `mode` says; it runs during a `with` block."""

    def __init__(self) -> None:
        self.mode = "good"
        self.asked: Counter[str] = Counter()
        self.sent_bytes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._ended = threading.Event()

    @property
    def url(self) -> str:
        """Its address, with /v1 at the end."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Agent:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(agent) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - the handler has a self of its own
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                agent.asked["redirected"] += 1
                self._say(200, b"{}")

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                is_redirected = self.path.endswith("/elsewhere")
                agent.asked["redirected" if is_redirected else agent.mode] += 1
                with contextlib.suppress(OSError):
                    self._answer("good" if is_redirected else agent.mode)

            def _answer(self, mode: str) -> None:
                good = json.dumps({"choices": [{"message": {"content": "a red cat"}}]}).encode()
                match mode:
                    case "good":
                        self._say(200, good)
                    case "redirect 302" | "redirect 308":
                        self.send_response(int(mode[-3:]))
                        self.send_header("Location", agent.url + "/elsewhere")
                        self.send_header("Content-Length", "0")
                        self.send_header("Connection", "close")
                        self.end_headers()
                    case "endless body":
                        self.send_response(200)
                        self.send_header("Content-Type", "application/json")
                        self.end_headers()
                        while not agent._ended.is_set():
                            self.wfile.write(_ENDLESS)
                            agent.sent_bytes += len(_ENDLESS)
                    case "gzip bomb":
                        self._say(200, gzip.compress(bytes(200 << 20), 1), encoding="gzip")
                    case "deep JSON":
                        self._say(200, b"[" * 30_000 + b"]" * 30_000)
                    case "no JSON":
                        self._say(200, b"\xff\x00<html>")
                    case "HTTP 500":
                        self._say(500, b"no")
                    case "slow":
                        agent._ended.wait(30)
                    case "drip":
                        self.send_response(200)
                        self.end_headers()
                        while not agent._ended.wait(0.3):
                            self.wfile.write(b" ")
                    case _:
                        linger = struct.pack("ii", 1, 0)
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        self.connection.close()
                self.close_connection = True

            def _say(self, status: int, body: bytes, encoding: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                if encoding:
                    self.send_header("Content-Encoding", encoding)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

        return Handler


def abuse_the_agent(trial: Trial, server: SglangServer, agent: Agent, num_each: int) -> None:
    """Asks a server whose agent misbehaves in each mode; it must answer in time, guided by the question alone.

    Args:
        trial: Counts and reports.
        server: A server with the agent's address and a time limit of `TIMEOUT_MS`.
        agent: The agent.
        num_each: Requests in each mode, each with a new text.
    """
    for mode in MODES:
        if trial.is_over() or not server.is_alive():
            break
        if not _awake(trial, server, agent):
            trial.fail("the agent is not asked again after it has recovered", f"before mode {mode}")
            break
        agent.mode, agent.sent_bytes = mode, 0
        before_bytes = resident_bytes(server)
        for number in range(num_each):
            _ask_once(trial, server, f"{mode} {number}", mode)
        if not agent.asked[mode]:
            trial.fail("the agent was never asked", f"mode {mode}")
        if mode == "endless body" and agent.sent_bytes > _MAX_SENT_BYTES * num_each:
            trial.fail("an endless answer of the agent is read on", f"{agent.sent_bytes >> 20} MB were taken")
        grown_bytes = resident_bytes(server) - before_bytes
        if grown_bytes > _MAX_GROWTH_BYTES:
            trial.fail(f"memory grew by over 256 MB: {mode}", f"{grown_bytes >> 20} MB, {num_each} requests")
        trial.step(f"agent: {mode}")
    agent.mode = "good"
    if agent.asked["redirected"]:
        trial.fail("a redirect of the agent is followed", f"{agent.asked['redirected']} times")
    trial.count("agent_calls", sum(agent.asked.values()))


def _ask_once(trial: Trial, server: SglangServer, text: str, mode: str) -> None:
    """Asks a question twice: the misbehaving agent must not change or delay the answer."""
    question = f"Is this {text} seed {trial.seed}?"
    body = chat_body([small_image("chelsea")], question, {})
    start_s = time.monotonic()
    trial.count("requests")
    try:
        answer = ask_for_logprobs(server, body, timeout_s=60)
        took_s = time.monotonic() - start_s
        # The same question again: an agent that gave no answer must not have changed the guidance.
        alone = ask_for_logprobs(server, body, timeout_s=60)
    except Exception as error:  # whatever the client raises
        trial.fail(f"a request fails when the agent misbehaves: {mode}", f"{question!r}: {error}"[:500])
        return
    if took_s > TIMEOUT_MS / 1000 + 3:
        trial.fail(f"a request waits for the agent beyond its time limit: {mode}", f"{question!r}: {took_s:.1f} s")
    if not largest_difference([answer], [alone]) <= TOLERANCE:
        trial.fail(f"an answer changes when it is repeated: {mode}", f"{question!r}")


def _awake(trial: Trial, server: SglangServer, agent: Agent) -> bool:
    """Returns whether the server asks the recovered agent again; after many failures, it may pause for a while."""
    agent.mode = "good"
    until_s = time.monotonic() + _AWAKE_WITHIN_S
    number = agent.asked["good"]
    while time.monotonic() < until_s and server.is_alive():
        text = f"Awake {number} {time.monotonic_ns()}?"
        send(server, "/v1/chat/completions", chat_body([small_image("chelsea")], text, {}, max_tokens=1))
        if agent.asked["good"] > number:
            return True
        time.sleep(1.0)
    return False


def agent_itself(trial: Trial, *flags: str) -> None:
    """Starts a server that is its own agent: it must refuse to start and name the flag."""
    server = make_soak_server(Served(trial.family, trial.folder, (*flags, f"--mmtok-agent-timeout-ms={TIMEOUT_MS}")))
    server.args = (*server.args, f"--mmtok-agent-url={server.url}/v1")
    trial.count("starts_as_its_own_agent")
    try:
        with server:
            for number in range(3):
                body = chat_body([small_image("chelsea")], f"Is it its own agent {number}?", {})
                reply = send(server, "/v1/chat/completions", body, timeout_s=60)
                if reply.status != 200 or reply.duration_s > TIMEOUT_MS / 1000 + 5:
                    what = f"{reply.status} after {reply.duration_s:.1f} s: {reply.text[:200]}"
                    trial.fail("a server that is its own agent does not answer in time", what)
            trial.fail("a server starts that is its own agent", f"--mmtok-agent-url={server.url}/v1")
    except ServerError as error:
        if "--mmtok-agent-url" not in str(error):
            trial.fail("a server that is its own agent does not start, and does not say why", str(error)[-500:])
