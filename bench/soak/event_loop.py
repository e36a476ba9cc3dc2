"""The HTTP process stays responsive while addresses of images hang and long guidance arrives."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from mmtok_deploy.bench.server import SglangServer
from mmtok_deploy.bench.soak.fixed_chats import chat_body, small_image
from mmtok_deploy.bench.soak.trial import Trial, send

__all__ = ["block_the_event_loop"]

_MAX_HEALTH_S = 0.25
_GUIDANCE_BYTES = 10 << 20
_TIMEOUT_S = 120.0
_POLL_S = 0.02


def block_the_event_loop(trial: Trial, server: SglangServer, num_rounds: int, *, num_urls: int = 32) -> None:
    """Asks /health all the time while images' addresses hang, and then while 10 MB of guidance arrive.

    The two come one after another, so that a failure says which; then together. Each request must be answered, and
    every answer of /health come within 250 ms.
    """
    for number in range(num_rounds):
        if trial.is_over() or not server.is_alive():
            break
        for kind in ("hanging addresses", "long guidance", "both"):
            urls = num_urls if kind != "long guidance" else 0
            _one_round(trial, server, f"{kind}, round {number}", kind, urls, with_guidance=kind != "hanging addresses")


def _one_round(trial: Trial, server: SglangServer, what: str, kind: str, num_urls: int, *, with_guidance: bool) -> None:
    done = threading.Event()
    slowest_s = 0.0
    num_asked = 0

    def poll() -> None:
        nonlocal slowest_s, num_asked
        while not done.wait(_POLL_S):
            reply = send(server, "/health", b"", method="GET", timeout_s=60)
            slowest_s = max(slowest_s, reply.duration_s)
            num_asked += 1
            if reply.status != 200:
                trial.fail("/health does not answer 200", f"{what}: {reply.status} {reply.text[:200]}")

    def ask(body: dict[str, object]) -> None:
        reply = send(server, "/v1/chat/completions", body, timeout_s=_TIMEOUT_S)
        trial.count("requests")
        trial.count(f"answers_{reply.status // 100}xx" if reply.status else "answers_none")
        if reply.status == 0:
            trial.fail(f"a request is not answered: {kind}", f"{what}: {reply.text[:200]}")

    with _hanging_server() as url:
        bodies = [chat_body([f"{url}/{what}-{each}.png"], "What is it?", {}) for each in range(num_urls)]
        if with_guidance:
            words = "word " * (_GUIDANCE_BYTES // 5)
            bodies.append(chat_body([small_image("coffee")], "What is it?", {"mmtok_guidance": words}))
            bodies.append(chat_body([small_image("coffee")], words, {}))
        poller = threading.Thread(target=poll)
        poller.start()
        clients = [threading.Thread(target=ask, args=(body,)) for body in bodies]
        try:
            for client in clients:
                client.start()
            for client in clients:
                client.join()
        finally:
            done.set()
            poller.join()
    trial.count("health_checks", num_asked)
    name = "slowest_health_ms_" + kind.replace(" ", "_")
    trial.numbers[name] = round(max(1000 * slowest_s, trial.numbers.get(name, 0.0)))
    if slowest_s > _MAX_HEALTH_S:
        trial.fail(f"/health takes longer than 250 ms: {kind}", f"{what}: {1000 * slowest_s:.0f} ms")


@contextlib.contextmanager
def _hanging_server() -> Iterator[str]:
    """Gives the address of a server that takes connections and says nothing for 5 s, then hangs up."""
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
