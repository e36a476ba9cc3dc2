from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil  # type: ignore[import-untyped]
import pytest

from mmtok_bench.server import ServerError, SglangServer, cpu_environment, running, started

START_AND_WAIT = """
import signal, sys
from mmtok_bench.server import SglangServer, cpu_environment
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and hand that down
with SglangServer("nowhere", env=cpu_environment(), on_progress=lambda *_: print("waiting", flush=True)):
    pass
"""


@pytest.mark.slow
def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "it.log"
    server = SglangServer(tmp_path / "no-checkpoint", env=cpu_environment(), log_path=log)
    with pytest.raises(ServerError, match=r"ended while starting \(exit status 1\)") as caught, server:
        pytest.fail("a server without a checkpoint has started")
    assert not server.is_alive()
    assert log.read_text() == server.log_text()
    last_line = server.log_text().rstrip().splitlines()[-1]
    assert "no-checkpoint" in last_line
    assert str(caught.value).endswith(last_line)


@pytest.mark.slow
def test_a_server_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    waits: list[float] = []
    server = SglangServer(
        tmp_path, env=cpu_environment(), start_timeout_s=0.5, on_progress=lambda waited_s, _: waits.append(waited_s)
    )
    with pytest.raises(ServerError, match=r"did not start within 0 s|did not start within 1 s"), running(server):
        pytest.fail("no server starts in half a second")
    assert waits
    assert not server.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_while_starting_leaves_no_process(number: signal.Signals, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    process.stdout.close()
    assert [p for p in children if p.is_running()] == []


@pytest.mark.slow  # as one that starts a server, of which it starts no more than a process
def test_a_process_that_starts_while_ctrl_c_comes_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def interrupted(*_: object, **__: object) -> subprocess.Popen[bytes]:
        made.append(real(["sleep", "600"], start_new_session=True))
        signal.raise_signal(signal.SIGINT)
        return made[0]

    monkeypatch.setattr("mmtok_bench.server.subprocess.Popen", interrupted)
    # A shell's background jobs ignore SIGINT, and hand that down.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), started(SglangServer(tmp_path)):
            pass
        assert made[0].wait(timeout=10) == -signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_replicas_are_not_given_one_port_for_their_ranks(tmp_path: Path) -> None:
    assert any(each.startswith("--nccl-port=") for each in SglangServer(tmp_path, "--tp=2").command)
    assert not any(each.startswith("--nccl-port=") for each in SglangServer(tmp_path, "--dp-size=2").command)


def test_no_two_servers_are_given_the_same_port(tmp_path: Path) -> None:
    # A tenth of all ports: drawn without a look at one another, some would be equal.
    servers = [SglangServer(tmp_path) for _ in range(200)]
    assert len({server.port for server in servers} | {server._ranks_port for server in servers}) == 400
    # SGLang binds like this.
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", servers[0].port))
        listener.listen()


@pytest.mark.slow
def test_a_dead_server_is_not_ready_though_another_answers_at_its_port(tmp_path: Path) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    server = SglangServer(tmp_path / "no-checkpoint", env=cpu_environment())
    with ThreadingHTTPServer(("127.0.0.1", server.port), Ready) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        server.start()
        while server.is_alive():
            time.sleep(0.1)
        with pytest.raises(ServerError, match="ended while starting"):
            server.wait_until_ready()
        other.shutdown()
    server.stop()


@pytest.mark.slow
def test_a_server_starts_once(tmp_path: Path) -> None:
    server = SglangServer(tmp_path)
    assert not server.is_alive()
    server.start()
    try:
        assert server.is_alive()
        with pytest.raises(ServerError, match="started before"):
            server.start()
    finally:
        server.stop()
    assert not server.is_alive()
    server.stop()


def test_a_server_that_does_not_run_says_so(tmp_path: Path) -> None:
    server = SglangServer(tmp_path)
    started_s = time.monotonic()
    with pytest.raises(ServerError, match="/server_info does not answer"):
        server.server_info()
    assert time.monotonic() - started_s < 5


def test_ranks_are_given_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in cpu_environment()
    assert cpu_environment(num_ranks=2)["SGLANG_CPU_OMP_THREADS_BIND"] == "0-1|2-3"
    assert cpu_environment(num_ranks=4)["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1|2|3"
    with pytest.raises(ValueError, match="between 1 and the 5 cores"):
        cpu_environment(num_ranks=6)


def test_a_long_line_at_the_end_of_a_log_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = SglangServer(tmp_path)
    monkeypatch.setattr(server, "log_text", lambda: f"server_args={'x' * 20_000}\nno memory\n")
    assert len(server.log_end()) < 1100
    assert server.log_end().endswith("xxx ...\nno memory")
