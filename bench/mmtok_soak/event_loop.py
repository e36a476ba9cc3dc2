"""Checks that the HTTP process stays responsive while image addresses hang and long guidance arrives."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mmtok_bench.families import FamilyName
from mmtok_bench.server import SglangServer
from mmtok_soak.fixed_chats import chat_body, small_image
from mmtok_soak.fuzz import ENDPOINTS
from mmtok_soak.trial import Trial

__all__ = ["block_the_event_loop", "polled_health"]

_MAX_HEALTH_S = 0.25
_GUIDANCE_BYTES = 10 << 20
_TIMEOUT_S = 120.0
_POLL_S = 0.02
# Prints the seconds of each answer, "nan" for another status than 200 or none within a minute, until it reads a line.
_POLL = """
import http.client, select, sys, time
print("ready", flush=True)
while not select.select([sys.stdin], [], [], float(sys.argv[2]))[0]:
    start_s, status = time.monotonic(), 0
    try:
        connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
        connection.request("GET", "/health")
        status = connection.getresponse().status
        connection.close()
    except OSError:
        pass
    print(time.monotonic() - start_s if status == 200 else "nan")
"""


def block_the_event_loop(trial: Trial, server: SglangServer, num_rounds: int, *, num_urls: int = 32) -> None:
    """Polls /health while image addresses hang, then while 10 MB of guidance arrive, then while both happen.

    Each request must be answered, and each answer of /health must come within 250 ms.
    """
    for number in range(num_rounds):
        if trial.is_over() or not server.is_alive():
            break
        for kind in ("hanging addresses", "long guidance", "both"):
            urls = num_urls if kind != "long guidance" else 0
            _one_round(trial, server, f"{kind}, round {number}", kind, urls, with_guidance=kind != "hanging addresses")


def _one_round(trial: Trial, server: SglangServer, what: str, kind: str, num_urls: int, *, with_guidance: bool) -> None:
    def ask(path: str, body: bytes) -> None:
        trial.count("requests")
        reply = trial.send(server, path, body, timeout_s=_TIMEOUT_S)
        if reply.status == 0:
            trial.fail(f"a request is not answered: {kind}", f"{what}: {path} {reply.text[:200]}")

    with _hanging_server() as url:
        chat = "/v1/chat/completions"
        requests = [(chat, chat_body([f"{url}/{what}-{each}.png"], "What is it?", {})) for each in range(num_urls)]
        if with_guidance:
            requests += _long_requests(trial.family, what)
        bodies = [(path, json.dumps(body).encode()) for path, body in requests]
        with polled_health(server) as times_s:
            clients = [threading.Thread(target=ask, args=each, daemon=True) for each in bodies]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
    trial.count("health_checks", len(times_s))
    if any(math.isnan(time_s) for time_s in times_s):
        trial.fail("/health does not answer 200", what)
    slowest_s = max((time_s for time_s in times_s if not math.isnan(time_s)), default=0.0)
    trial.highest("slowest_health_ms_" + kind.replace(" ", "_"), round(1000 * slowest_s))
    if slowest_s > _MAX_HEALTH_S:
        trial.fail(f"/health takes longer than 250 ms: {kind}", f"{what}: {1000 * slowest_s:.0f} ms")


def _long_requests(family: FamilyName, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields path and body of requests with 10 MB of guidance, in each field that may hold guidance.

    Each text is new, since SGLang caches the tokens of messages.
    """
    image, words = small_image("coffee"), f"{what} " + "word " * (_GUIDANCE_BYTES // 5)
    short = chat_body([image], "What is it?", {})
    yield "/v1/chat/completions", chat_body([image], "What is it?", {"mmtok_guidance": words})
    yield "/v1/chat/completions", chat_body([image], f"chat {words}", {})
    system = {"role": "system", "content": f"system {words}"}
    yield "/v1/chat/completions", short | {"messages": [system, *short["messages"]]}
    message = ENDPOINTS["/v1/messages"](family)
    message["messages"][0]["content"].append({"type": "text", "text": f"message {words}"})
    yield "/v1/messages", message
    generate = ENDPOINTS["/generate"](family)
    yield "/generate", generate | {"text": f"{generate['text']} generate {words}"}


@contextlib.contextmanager
def polled_health(server: SglangServer) -> Iterator[list[float]]:
    """Yields a list that has the seconds of each answer of /health after the block; NaN for a status other than 200.

    Another process polls, since this one is busy with the requests.
    """
    times_s: list[float] = []
    command = [sys.executable, "-c", _POLL, str(server.port), str(_POLL_S)]
    poller = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert poller.stdout is not None
        poller.stdout.readline()
        yield times_s
        # The poller ends at the first line of its input.
        said, _ = poller.communicate("end\n", timeout=_TIMEOUT_S)
        times_s += map(float, said.split())
    finally:
        poller.kill()
        poller.wait()


@contextlib.contextmanager
def _hanging_server() -> Iterator[str]:
    """Yields the address of a server that accepts connections, sends nothing, and closes them after 5 s."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    open_until: list[tuple[float, socket.socket]] = []
    done = threading.Event()

    def serve() -> None:
        listener.settimeout(0.1)
        while not done.is_set():
            with contextlib.suppress(OSError):
                open_until.append((time.monotonic() + 5.0, listener.accept()[0]))
            while open_until and open_until[0][0] < time.monotonic():
                open_until.pop(0)[1].close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        done.set()
        thread.join()
        for _, connection in open_until:
            connection.close()
        listener.close()
