"""Real SGLang servers for as long as a `with` block runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import httpx
import openai

from mmtok_bench.client import MeasurementError, openai_client
from mmtok_bench.families import FamilyName, family_arguments
from mmtok_bench.process_tree import end_process_tree, signals_wait, sigterm_raises_exit

__all__ = [
    "ServerError",
    "ServerPool",
    "SglangServer",
    "cpu_arguments",
    "cpu_environment",
    "fetch",
    "make_server",
    "running",
    "server_info",
    "started",
]

_Key = TypeVar("_Key", bound=Hashable)

_POLL_INTERVAL_S = 0.25
# Short, since after SIGTERM SGLang only waits 5 s for a crash diagnosis.
_STOP_GRACE_S = 1.0
_LOG_END_LINES = 40
_LOG_LINE_LEN = 1000
# Below the ports that SGLang chooses by itself (from 22000) and those that the system gives to outgoing connections
# (from 32768): a server binds its ports long after it has been given them.
_PORTS = range(20000, 22000)
_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    # Otherwise a tokenizer worker whose imports take over 10 s on a busy machine is ended and restarted repeatedly.
    "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "120",
}
# Ignores proxies of the environment. Made once, since that takes tens of milliseconds; no connection is reused, since a
# server may have ended in between.
_CLIENT = httpx.Client(trust_env=False, follow_redirects=True, limits=httpx.Limits(max_keepalive_connections=0))


class ServerError(MeasurementError):
    """A server that died, did not start in time, or was asked something while it does not run."""


def cpu_arguments(*, max_total_tokens: int = 16384, max_running_requests: int = 8) -> list[str]:
    """Returns the server arguments that keep a server without an accelerator small and quick to start.

    Args:
        max_total_tokens: Tokens of KV cache, shared by the running requests.
        max_running_requests: Requests that run at a time.
    """
    return [
        "--device=cpu",
        "--dtype=float32",
        "--skip-server-warmup",
        # Else an idle scheduler keeps a core busy, and a request on two cores takes several times as long.
        "--sleep-on-idle",
        f"--max-total-tokens={max_total_tokens}",
        f"--max-running-requests={max_running_requests}",
        # States of linear attention, if the model has some: else SGLang takes most of the machine's memory for them.
        f"--max-mamba-cache-size={16 * max_running_requests}",
    ]


def cpu_environment(*, num_ranks: int = 1) -> dict[str, str]:
    """Returns the environment variables that a server without an accelerator needs.

    Args:
        num_ranks: Tensor-parallel times pipeline-parallel size; each rank is given cores of its own.

    Raises:
        ValueError: More ranks than cores, or fewer than one rank.
    """
    num_cores = os.cpu_count() or 1
    if not 1 <= num_ranks <= num_cores:
        raise ValueError(f"num_ranks is between 1 and the {num_cores} cores there are, got {num_ranks}")
    environment = {
        # Without it, servers use the accelerators that there are.
        "CUDA_VISIBLE_DEVICES": "",
        # Compiling the few graphs of a first request takes 18 s on two cores, and running them uncompiled under 1 s.
        "TORCHDYNAMO_DISABLE": "1",
        # Else SGLang keeps the last tokens before a chunk in bfloat16, for the convolutions of linear attention.
        "SGLANG_MAMBA_CONV_DTYPE": "float32",
    }
    if num_ranks > 1:
        each = num_cores // num_ranks
        ranges = [(rank * each, (rank + 1) * each - 1) for rank in range(num_ranks)]
        bind = "|".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = bind
    return environment


def fetch(url: str, *, timeout_s: float = 30.0) -> str:
    """Returns the body of a server's answer to a GET request, which is sent without a proxy.

    Raises:
        ServerError: The server does not answer, or answers with an error.
    """
    try:
        return _CLIENT.get(url, timeout=timeout_s).raise_for_status().text
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"{url} does not answer: {error}") from error


def server_info(url: str, *, prunes: bool = False) -> dict[str, Any]:
    """Returns a server's arguments, version and state, from its endpoint /server_info.

    Args:
        url: The server's address, without a path.
        prunes: Whether a server without a budget is an error.

    Raises:
        ServerError: The server does not answer, is not an SGLang server, or has no budget.
    """
    text = fetch(f"{url.rstrip('/')}/server_info")
    try:
        info = json.loads(text)
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise ServerError(f"{url} does not say what it is: expected an SGLang server there, got {text[:60]!r}")
    if prunes and info.get("mmtok_budget") is None:
        raise ServerError(f"the server at {url} does not prune: start it with --mmtok-budget all")
    return info


class SglangServer:
    """One `python -m sglang.launch_server`, started on entering a `with` block and ended with everything it started.

    The server runs in a session of its own, so that Ctrl-C reaches only this process, which then ends the server.
    `running` and `started` start and end several servers at once.

    Args:
        model_path: A checkpoint folder or a model's name.
        *args: Further arguments of the server, as on its command line.
        env: Environment variables that the server gets in addition to this process's.
        log_path: File for the server's output; by default a temporary file, which `log_text` reads.
        start_timeout_s: Seconds to wait for the server's start.
        on_progress: Called during the wait, with the seconds since the start and the log's last line.

    Raises:
        ServerError: On entering, if the server dies or does not start in time; the message ends with the log's end.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *args: str,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        start_timeout_s: float = 300.0,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self.model_path = os.fspath(model_path)
        self.args = args
        self.port = self._reserved_port()
        self._ranks_port = self._reserved_port()
        self.start_s: float | None = None
        self.environment = dict(env or {})
        self._log_path = log_path
        self._start_timeout_s = start_timeout_s
        self._on_progress = on_progress
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._log_when_stopped = ""
        self._started_at_s = 0.0
        self._block = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """The server's address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def command(self) -> list[str]:
        """The command line that `start` runs."""
        return [
            *(sys.executable, "-m", "sglang.launch_server"),
            *(f"--model-path={self.model_path}", "--host=127.0.0.1", f"--port={self.port}"),
            # Each data-parallel replica would listen on it.
            *(() if any(each.startswith("--dp-size") for each in self.args) else (f"--nccl-port={self._ranks_port}",)),
            *self.args,
        ]

    @property
    def full_environment(self) -> dict[str, str]:
        """All environment variables of the server."""
        return {**_ENVIRONMENT, **os.environ, **self.environment}

    @property
    def process_id(self) -> int:
        """The PID of the server's first process, which is also the id of its session.

        Raises:
            ServerError: The server was not started.
        """
        if self._process is None:
            raise ServerError("the server was not started")
        return self._process.pid

    def client(self) -> openai.OpenAI:
        """Returns an OpenAI client for this server."""
        return openai_client(self.url)

    def server_info(self) -> dict[str, Any]:
        """Returns the server's arguments, version and state.

        Raises:
            ServerError: The server does not answer; the message ends with the log's end.
        """
        try:
            return server_info(self.url)
        except ServerError as error:
            raise ServerError(f"{error}.\n{self.log_end()}") from error

    def log_text(self) -> str:
        """Returns all output of the server so far; it can also be read after the server has ended."""
        if self._log is None:
            return self._log_when_stopped
        # pread: the server writes through the same file description, whose offset must not move.
        size_bytes = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size_bytes, 0).decode(errors="replace")

    def log_end(self) -> str:
        """Returns the last lines of the server's output, for a message."""
        return f"The end of its log:\n{self._log_lines(_LOG_END_LINES)}"

    def is_alive(self) -> bool:
        """Returns whether the server was started and has not ended."""
        return self._process is not None and self._exit_status() is None

    def start(self) -> None:
        """Starts the process; `wait_until_ready` waits for the server.

        Raises:
            ServerError: The server was started before.
        """
        if self._process is not None:
            raise ServerError(f"the server at {self.url} was started before: make another SglangServer")
        if self._log_path is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115
        else:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._log_path.open("w+b")
        self._started_at_s = time.monotonic()
        with signals_wait():
            self._process = self._started_process(self._log)

    def _started_process(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=self.full_environment,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        """Waits until the server takes requests; a server that was ready before has `start_timeout_s` again to answer.

        Raises:
            ServerError: The server died, or did not start or answer in time; the message ends with the log's end.
        """
        since_s = self._started_at_s if self.start_s is None else time.monotonic()
        while True:
            # Checked before the port, at which another server might answer if this one has ended.
            if not self.is_alive():
                raise ServerError(
                    f"the server for {self.model_path} ended while starting (exit status {self._exit_status()}).\n"
                    f"{self.log_end()}"
                )
            with contextlib.suppress(ServerError):
                fetch(f"{self.url}/ready", timeout_s=5)
                break
            waited_s = time.monotonic() - since_s
            if waited_s > self._start_timeout_s:
                missed = "start" if self.start_s is None else "answer"
                raise ServerError(
                    f"the server for {self.model_path} did not {missed} within {self._start_timeout_s:.0f} s: "
                    f"see why below, or give it a longer start_timeout_s.\n{self.log_end()}"
                )
            if self._on_progress is not None:
                self._on_progress(waited_s, self._log_lines(1))
            time.sleep(_POLL_INTERVAL_S)
        if self.start_s is None:
            self.start_s = time.monotonic() - self._started_at_s

    def stop(self) -> None:
        """Ends the server and all its processes: by SIGTERM, and by SIGKILL a second later or on a second Ctrl-C."""
        if self._process is None or self._process.returncode is not None:
            return
        try:
            end_process_tree(self._process.pid, grace_s=_STOP_GRACE_S)
        finally:
            self._process.wait()
            if self._log is not None:
                self._log_when_stopped = self.log_text()
                self._log.close()
                self._log = None

    def __enter__(self) -> SglangServer:
        self._block.enter_context(running(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._block.close()

    def _reserved_port(self) -> int:
        """Returns a port that no other reservation gets, in any process, as long as this object lives.

        Servers bind with SO_REUSEADDR, which shares a port without a listener if its holder allows it; the next
        reservation binds without SO_REUSEADDR, which fails.
        """
        for port in random.sample(_PORTS, 200):
            reservation = socket.socket()
            try:
                reservation.bind(("127.0.0.1", port))
            except OSError:
                reservation.close()
                continue
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            weakref.finalize(self, reservation.close)
            return port
        raise ServerError(
            f"found no free port between {_PORTS.start} and {_PORTS.stop - 1}: are too many servers running?"
        )

    def _exit_status(self) -> int | None:
        if self._process is None or self._process.returncode is not None:
            return None if self._process is None else self._process.returncode
        # WNOWAIT leaves the zombie: until `stop`, no other process gets its PID.
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _log_lines(self, num_lines: int) -> str:
        lines = self.log_text().rstrip().splitlines()[-num_lines:]
        # SGLang writes all of its arguments in one line of 15,000 characters.
        return "\n".join(line if len(line) <= _LOG_LINE_LEN else f"{line[:_LOG_LINE_LEN]} ..." for line in lines)


def make_server(
    model_path: str | os.PathLike[str],
    family: FamilyName | None,
    *args: str,
    on_cpu: bool = True,
    max_total_tokens: int = 16384,
    max_running_requests: int = 8,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> SglangServer:
    """Returns a server, not started, with the arguments and variables that its family and its device need.

    Args:
        model_path: A checkpoint folder or a model's name.
        family: The model's family; None if it is not known.
        *args: Further arguments, which win over those of the device.
        on_cpu: Whether the server computes without an accelerator.
        max_total_tokens: As in `cpu_arguments`.
        max_running_requests: As in `cpu_arguments`.
        env: Further environment variables.
        **options: As in `SglangServer`.
    """
    small = cpu_arguments(max_total_tokens=max_total_tokens, max_running_requests=max_running_requests)
    arguments = (*(small if on_cpu else ()), *family_arguments(family), *args)
    return SglangServer(model_path, *arguments, env=(cpu_environment() if on_cpu else {}) | dict(env or {}), **options)


class ServerPool(Generic[_Key]):
    """Servers that are started when they are first asked for, and ended when the `with` block ends.

    Args:
        make: Returns the server of a key, not started.
        side_by_side: Whether all servers run at once. Otherwise a server ends when another one is asked for.
        restarts: Whether a server that died is started anew when it is asked for again.
    """

    def __init__(
        self, make: Callable[[_Key], SglangServer], *, side_by_side: bool = False, restarts: bool = False
    ) -> None:
        self.dead: dict[_Key, str] = {}
        self._make = make
        self._side_by_side = side_by_side
        self._restarts = restarts
        self._servers: dict[_Key, SglangServer] = {}
        self._block = contextlib.ExitStack()

    def __enter__(self) -> ServerPool[_Key]:
        self._block.enter_context(sigterm_raises_exit())
        self._block.callback(self.stop_all)
        return self

    def __exit__(self, *error: object) -> None:
        self._block.close()

    def start_all(self, keys: Iterable[_Key]) -> None:
        """Starts the servers of these keys if servers run side by side; `get` waits for each."""
        for key in keys if self._side_by_side else ():
            self._start(key)

    def get(self, key: _Key) -> SglangServer:
        """Waits until the key's server takes requests, and returns it.

        Raises:
            ServerError: The server died, now or before.
        """
        if key in self.dead:
            raise ServerError(self.dead[key])
        if self._restarts and key in self._servers and not self._servers[key].is_alive():
            self._servers.pop(key).stop()
        if key not in self._servers:
            if not self._side_by_side:
                self.stop_all()
            self._start(key)
        server = self._servers[key]
        try:
            server.wait_until_ready()
        except ServerError as error:
            # A process that is being killed counts as alive a moment longer: this is checked after the wait.
            has_died = server.start_s is not None and not server.is_alive()
            what = f"the server died.\n{server.log_end()}" if has_died else str(error)
            if not self._restarts:
                self.dead[key] = what
            self._servers.pop(key).stop()
            raise ServerError(what) from error
        return server

    def stop_all(self) -> None:
        """Ends all servers."""
        for key in list(self._servers):
            self._servers.pop(key).stop()

    def _start(self, key: _Key) -> None:
        self._servers[key] = self._make(key)
        self._servers[key].start()


@contextlib.contextmanager
def started(*servers: SglangServer) -> Iterator[None]:
    """Starts servers, runs the block without waiting for them, and ends them all, also after an error."""
    with sigterm_raises_exit(), contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start()
        yield


@contextlib.contextmanager
def running(*servers: SglangServer) -> Iterator[None]:
    """Starts servers, runs the block when all are ready, and ends them all, also after an error.

    Raises:
        ServerError: A server died or did not start in time.
    """
    with started(*servers):
        for server in servers:
            server.wait_until_ready()
        yield
