"""SIGKILL of one of a server's processes: the whole server must end within 10 s."""

from __future__ import annotations

import contextlib
import threading
import time

import psutil  # type: ignore[import-untyped]

from mmtok_bench.process_tree import is_alive, process_tree
from mmtok_bench.server import ServerError, SglangServer
from mmtok_soak.fixed_chats import chat_body, small_image
from mmtok_soak.trial import Served, Trial, make_soak_server, send

__all__ = ["kill_processes"]

_GONE_WITHIN_S = 10.0


def kill_processes(trial: Trial, num_trials: int, *flags: str) -> None:
    """Starts a server, kills one of its processes while requests run, and checks the others; `num_trials` times.

    The resource tracker of Python's multiprocessing may end without the server, which must then answer. Shared memory
    that is left is not checked.
    """
    for number in range(num_trials):
        if trial.is_over():
            break
        trial.step(f"SIGKILL {number + 1} of {num_trials}: starting a server")
        server = make_soak_server(Served(trial.family, trial.folder, flags))
        try:
            with server:
                trial.not_counted(server.start_s or 0)
                _kill_one(trial, number, server)
        except ServerError as error:
            trial.fail("a server does not start", str(error)[-600:])
            return


def _kill_one(trial: Trial, number: int, server: SglangServer) -> None:
    draw = trial.random("kill", number)
    body = chat_body([small_image("coffee")], "What is in this cup?", {}, max_tokens=200)
    replies: list[int] = []

    def ask() -> None:
        replies.append(send(server, "/v1/chat/completions", body, timeout_s=60).status)

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for client in clients:
        client.start()
    time.sleep(draw.uniform(0.0, 1.0))
    processes = sorted(process_tree(server.process_id), key=lambda each: each.pid)
    chosen = draw.choice(processes)
    name = _name(chosen)
    chosen.kill()
    start_s = time.monotonic()
    trial.count("kills")
    trial.count(f"kills_of_{name}")
    what = f"seed {trial.seed} family {trial.family} kill {number}: {name}"
    while process_tree(server.process_id) and time.monotonic() - start_s < _GONE_WITHIN_S:
        time.sleep(0.05)
    gone_s = time.monotonic() - start_s
    left = [_name(each) for each in process_tree(server.process_id)]
    if not left:
        trial.highest("gone_after_s", round(gone_s, 1))
    elif name == "resource_tracker" and server.is_alive():
        trial.count("servers_that_go_on")
        short = chat_body([small_image("coffee")], "What is in this cup?", {})
        if send(server, "/v1/chat/completions", short).status != 200:
            trial.fail("a server that goes on after SIGKILL of a helper does not answer", what)
    else:
        trial.fail(f"processes are left 10 s after SIGKILL of {name}", f"{what}; left: {', '.join(left)}")
    server.stop()
    for client in clients:
        client.join(30)
    if any(client.is_alive() for client in clients):
        trial.fail("a client still waits after its server has gone", what)
    orphans = [each for each in processes if each.is_running() and is_alive(each)]
    if orphans:
        trial.fail("orphans run on after the server has ended", f"{what}: {[each.pid for each in orphans]}")
    for each in orphans:
        # The soak leaves no process.
        with contextlib.suppress(psutil.Error):
            each.kill()


def _name(process: psutil.Process) -> str:
    """Returns a short name of the process's task."""
    title = ""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline())
    for mark, name in (
        ("resource_tracker", "resource_tracker"),
        ("scheduler", "scheduler"),
        ("detokenizer", "detokenizer"),
        ("launch_server", "http_server"),
        ("spawn_main", "spawned"),
    ):
        if mark in title:
            return name
    return title.split(" ")[0].rpartition("/")[2] or "process"
