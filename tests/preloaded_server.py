"""Servers, and other programs that import SGLang, as forks of a process that has imported it once.

Imports are most of what starting a small server takes: 27 of 31 s of a core, in three processes. A template is a
process that has imported SGLang, and forks when it is asked to: `Template.start` forks a program's first process, which
keeps a template of its own for the processes and the servers that it starts. All that follows the imports is what
`python` does with these arguments. Variables that are read while importing have the template's values.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import multiprocessing.util
import os
import pickle
import pkgutil
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import setproctitle

if TYPE_CHECKING:
    from mmtok_bench.server import SglangServer

__all__ = ["Child", "Template", "Templates", "preloaded_servers"]

_MODULES = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.model_executor.model_runner",
    "numba",
    "timm",
)
# Variables that are not read by imports, but later. Any other makes a template of its own.
_READ_LATER = {
    "MMTOK_SOAK_FAULTS",
    "MMTOK_TEST_FAULTS",
    "PYTHONPATH",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION",
    "SGLANG_PP_LAYER_PARTITION",
    "SGLANG_TEST_RETRACT",
    "SGLANG_TEST_RETRACT_INTERVAL",
    "SGLANG_VIT_ENABLE_CUDA_GRAPH",
    "SGLANG_VLM_CACHE_SIZE_MB",
}
_PR_SET_CHILD_SUBREAPER = 36
_FIRST_FREE_FD = 256
_SERVER = ["-m", "sglang.launch_server"]


@contextmanager
def preloaded_servers() -> Iterator[Templates]:
    """Makes the servers of an `SglangServer` on a CPU forks of templates, which start with the first that needs them.

    Servers without the environment variables of a server on a CPU start afresh.
    """
    from mmtok_bench.server import SglangServer

    templates = Templates()
    start_afresh = SglangServer._started_process
    _start_servers_from(lambda server: templates.of(server.environment)._socket)
    try:
        yield templates
    finally:
        SglangServer._started_process = start_afresh  # type: ignore[method-assign]
        templates.close()


def _start_servers_from(template_of: Callable[[SglangServer], socket.socket]) -> None:
    """Makes the servers that this process starts forks of templates, but for those that start afresh."""
    from mmtok_bench.server import SglangServer, cpu_environment

    start_afresh = SglangServer._started_process

    def started_process(server: SglangServer, output: IO[bytes]) -> subprocess.Popen[bytes] | Child:
        if not cpu_environment().items() <= server.environment.items():
            return start_afresh(server, output)
        return _start(template_of(server), server.command[1:], server.full_environment, output.fileno())

    SglangServer._started_process = started_process  # type: ignore[method-assign, assignment]


class Templates:
    """The templates of this process, by the variables that their imports read."""

    def __init__(self) -> None:
        self._templates: dict[frozenset[tuple[str, str]], Template] = {}

    def of(self, environment: Mapping[str, str]) -> Template:
        """Returns the template of processes with these environment variables, on top of this process's."""
        read = {name: value for name, value in environment.items() if name not in _READ_LATER}
        key = frozenset(read.items())
        if key not in self._templates:
            self._templates[key] = Template(read)
        return self._templates[key]

    def close(self) -> None:
        """Ends all of them; their forks go on."""
        for template in self._templates.values():
            template.close()


class Child:
    """A process that a template forked; this process is its parent."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for its end and returns its exit status, negative for a signal.

        Raises:
            TimeoutError: It has not ended after that many seconds.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, 0 if deadline_s is None else os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                break
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout_s} s")
            time.sleep(0.02)
        return self.returncode


class Template:
    """A process that has imported SGLang with some environment variables.

    Args:
        environment: The environment variables that it has on top of this process's.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], output_fd: int, errors_fd: int | None = None
    ) -> Child:
        """Forks a program in a session of its own, without standard input.

        Args:
            arguments: Of `python`: `-m` and a module, `-c` and code, or a file; then the program's.
            environment: All its environment variables.
            output_fd: The file that takes what it prints.
            errors_fd: The file that takes what it prints to standard error; by default the same.
        """
        return _start(self._socket, arguments, environment, output_fd, errors_fd)

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Returns what a program printed, when it has ended; arguments are those of `start`."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = self.start(arguments, environment, output.fileno(), errors.fileno())
            try:
                code = child.wait(timeout_s)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read())
        return subprocess.CompletedProcess([sys.executable, *arguments], code, *texts)

    @contextmanager
    def spawns(self) -> Iterator[None]:
        """Makes the processes that `multiprocessing` spawns from here forks of the template meanwhile."""
        execute = multiprocessing.util.spawnv_passfds
        _spawn_from(self._socket)
        try:
            yield
        finally:
            multiprocessing.util.spawnv_passfds = execute

    def close(self) -> None:
        """Ends it; the servers go on."""
        self._socket.close()
        self._process.wait()


def _start(
    template: socket.socket,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    output_fd: int,
    errors_fd: int | None = None,
) -> Child:
    """Does what `Template.start` does, by what the template listens to."""
    with open(os.devnull) as nothing:
        fds = {0: nothing.fileno(), 1: output_fd, 2: output_fd if errors_fd is None else errors_fd}
        return Child(_ask(template, list(arguments), dict(environment), fds, is_program=True))


def _ask(
    template: socket.socket, arguments: list[str], environment: dict[str, str], fds: dict[int, int], *, is_program: bool
) -> int:
    """Has a template fork a child of this process, and returns its number.

    Args:
        template: What the template listens to.
        arguments: Those of `Template.start`, or of a process that was spawned: the code, and what follows it.
        environment: All its environment variables.
        fds: The file descriptors that it has, by their numbers in the child.
        is_program: Whether it is a program's first process; else it was spawned by one.
    """
    request = pickle.dumps((arguments, environment, os.getcwd(), list(fds), is_program))
    answer = b""
    with _adopts_orphans(), suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(template, [struct.pack("!I", len(request))], list(fds.values()))
        template.sendall(request)
        answer = template.recv(4, socket.MSG_WAITALL)
    if len(answer) < 4:
        raise RuntimeError("the process that has imported SGLang has ended: its output says why")
    return int(struct.unpack("!I", answer)[0])


@contextmanager
def _adopts_orphans() -> Iterator[None]:
    """Makes processes whose parent ends, below this one, its children."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _serve(requests: socket.socket) -> Callable[[], Any]:
    """Forks for each request, until the asking process ends; returns in the children, with what they have to run."""
    while True:
        header, fds, *_ = socket.recv_fds(requests, 4, 64)
        if not header:
            os._exit(0)
        size = struct.unpack("!I", header)[0]
        arguments, environment, folder, numbers, is_program = pickle.loads(requests.recv(size, socket.MSG_WAITALL))
        number_read, number_written = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                requests.close()
                os.close(number_read)
                os.close(number_written)
                _take(dict(zip(numbers, fds, strict=True)))
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                _read_again()
                return partial(_run_program if is_program else _run_spawned, arguments)
            os.write(number_written, struct.pack("!I", child))
            os._exit(0)
        # Its child is one of the process that asked from now on.
        os.waitpid(between, 0)
        requests.sendall(os.read(number_read, 4))
        for each in (number_read, number_written, *fds):
            os.close(each)


def _read_again() -> None:
    """Reads the variables that the scheduler's module reads when it is imported, and that tests set for servers."""
    from sglang.srt.environ import envs
    from sglang.srt.managers import scheduler

    scheduler.TEST_RETRACT = envs.SGLANG_TEST_RETRACT.get()
    scheduler.TEST_RETRACT_INTERVAL = envs.SGLANG_TEST_RETRACT_INTERVAL.get()


def _look_once_for_what_is_hooked() -> None:
    """Makes SGLang put all wrappers into the modules that imported what they wrap in one pass through the modules.

    It goes through all 8000 modules for each hook, which takes each process of a server 2 s of a core.
    """
    from sglang.srt.plugins import hook_registry

    apply_hooks = hook_registry.HookRegistry.apply_hooks

    def apply_all() -> None:
        wrappers: dict[int, tuple[object, object, object]] = {}

        def remember(original: object, wrapper: object, source: object) -> int:
            wrappers[id(original)] = original, wrapper, source
            return 0

        hook_registry._propagate_patch = remember
        apply_hooks()
        for module in list(sys.modules.values()):
            if isinstance(module, types.ModuleType) and not wrappers.keys().isdisjoint(map(id, vars(module).values())):
                for name, value in list(vars(module).items()):
                    _, wrapper, source = wrappers.get(id(value), (None, None, module))
                    if source is not module:
                        setattr(module, name, wrapper)

    hook_registry.HookRegistry.apply_hooks = apply_all


def _take(fds: dict[int, int]) -> None:
    """Gives file descriptors their numbers."""
    # Away from the numbers first, which some of them may have.
    aside = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD) for number, fd in fds.items()}
    for fd in set(fds.values()):
        os.close(fd)
    for number, fd in aside.items():
        os.dup2(fd, number)
        os.close(fd)


def _run_program(arguments: list[str]) -> None:
    os.setsid()
    # Before the environment's memory is the title's; programs are told apart by it.
    setproctitle.setproctitle(" ".join([sys.executable, *arguments]))

    def run(template: socket.socket) -> None:
        if arguments[:2] != _SERVER:
            _start_servers_from(lambda server: template)
        what, *rest = arguments
        # As Python itself begins.
        folder = str(Path(what).resolve().parent) if what not in ("-m", "-c") else os.getcwd()
        sys.path[:0] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        if what == "-m":
            sys.argv = ["", *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif what == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(rest[0], sys.modules["__main__"].__dict__)
        else:
            sys.argv = arguments
            runpy.run_path(what, run_name="__main__")

    _run_above_a_template(run)


def _run_above_a_template(run: Callable[[socket.socket], None]) -> None:
    """Runs a function in a process that forks what it spawns from a template of its own, which the function is given.

    The forks are its children only if their template is.
    """
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        _serve(theirs)()
    else:
        theirs.close()
        _spawn_from(ours)
        run(ours)


def _spawn_from(template: socket.socket) -> None:
    """Makes the processes that multiprocessing spawns from here forks of the template."""
    execute = multiprocessing.util.spawnv_passfds
    one_at_a_time = threading.Lock()

    def spawn(path: bytes, command: list[str], fds: list[int]) -> int:
        if "--multiprocessing-fork" not in command:
            return execute(path, command, fds)
        kept = {int(fd): int(fd) for fd in {0, 1, 2, *fds}}
        with one_at_a_time:
            return _ask(template, command[command.index("-c") + 1 :], dict(os.environ), kept, is_program=False)

    multiprocessing.util.spawnv_passfds = spawn  # type: ignore[assignment]


def _run_spawned(arguments: list[str]) -> None:
    code, *rest = arguments

    def run(template: socket.socket) -> None:
        sys.argv = ["-c", *rest]
        exec(code, {"__name__": "__main__"})

    _run_above_a_template(run)


def _main() -> None:
    # Files that the imports open, and close at any time, stay away from the numbers that a fork's own files have.
    low = [os.open(os.devnull, os.O_RDONLY) for _ in range(_FIRST_FREE_FD)]
    for module in _MODULES:
        importlib.import_module(module)
    processors = importlib.import_module("sglang.srt.multimodal.processors")
    for each in pkgutil.iter_modules(processors.__path__, f"{processors.__name__}."):
        # SGLang goes on as well: some need packages that are not installed.
        with suppress(ImportError):
            importlib.import_module(each.name)
    for fd in low:
        os.close(fd)
    _look_once_for_what_is_hooked()
    # It finds the memory of the title now: in a process whose environment has been replaced, it could no more.
    setproctitle.getproctitle()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("the imports started threads, which forks would not have")
    gc.freeze()
    run = _serve(socket.socket(fileno=int(sys.argv[1])))
    code = 0
    try:
        run()
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    # As Python ends, but without taking down all modules, which takes a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main()
