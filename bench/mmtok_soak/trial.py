"""One run of a row of the fault table: its servers, counts and failures, and the checks of its servers."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from mmtok_bench.families import FamilyName
from mmtok_bench.process_tree import process_tree, sum_resident_bytes
from mmtok_bench.server import ServerError, ServerPool, SglangServer, make_server
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_soak.fixed_chats import TOLERANCE, ask_fixed_chats, largest_difference

__all__ = ["Failure", "Reply", "Served", "Trial", "make_soak_server", "resident_bytes", "send"]

_FULL_MINUTES = 30.0
_MAX_SERVER_BYTES = 8 << 30
_IDLE_TIMEOUT_S = 60
_START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that did not hold.

    Args:
        what: One sentence, the same for failures of one kind.
        reproduction: How to reproduce it: seed, number, body.
    """

    what: str
    reproduction: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer to one HTTP request; status 0 means no answer, and `text` says why."""

    status: int
    text: str
    duration_s: float


def send(
    server: SglangServer, path: str, body: bytes | dict[str, Any], *, timeout_s: float = 60.0, method: str = "POST"
) -> Reply:
    """Returns the server's answer to a body, which may be invalid; HTTP and connection errors are not raised."""
    start_s = time.monotonic()
    try:
        with httpx.Client(trust_env=False, timeout=timeout_s) as client:
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            headers = {"Content-Type": "application/json"} if isinstance(body, bytes) else {}
            if method == "GET":
                answer = client.get(server.url + path)
            else:
                answer = client.post(server.url + path, headers=headers, **content)
        return Reply(answer.status_code, answer.text, time.monotonic() - start_s)
    except httpx.TimeoutException:
        return Reply(0, f"no answer within {timeout_s:g} s", time.monotonic() - start_s)
    except httpx.HTTPError as error:
        return Reply(0, f"{type(error).__name__}: {error}", time.monotonic() - start_s)


@dataclass(frozen=True, slots=True)
class Served:
    """The key of a server of the soak: its family, and flags and environment besides the usual ones."""

    family: FamilyName
    folder: Path
    flags: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def make_soak_server(key: Served) -> SglangServer:
    """Returns a server, not started, of the family's tiny checkpoint."""
    checkpoint = make_tiny_checkpoint(key.family, key.folder / "checkpoints" / f"{key.family}-0")
    usual = {
        # /health then answers at once from the event loop; otherwise it generates a token, which takes a second.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        # Otherwise SGLang 0.5.23 waits 60 s for CUDA core dumps if a process other than a scheduler dies.
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1"),
    }
    log = f"{key.family}-{time.strftime('%H%M%S')}-{time.monotonic_ns() % 1000:03d}.log"
    return make_server(
        checkpoint,
        key.family,
        *key.flags,
        env=usual | dict(key.environment),
        log_path=key.folder / "logs" / log,
        start_timeout_s=_START_TIMEOUT_S,
    )


@dataclass(slots=True)
class Trial:
    """One run of a row with one model family.

    Args:
        family: The served model's family.
        folder: For logs and checkpoints.
        minutes: Minutes of the whole run; in a run of 30 minutes, every row has its full count.
        num_families: Number of families that share this count.
        seed: Seed of all random choices.
        step: Called with a line of progress.
        pool: The servers.
    """

    family: FamilyName
    folder: Path
    minutes: float = _FULL_MINUTES
    num_families: int = 1
    seed: int = 0
    step: Callable[[str], None] = lambda text: None
    pool: ServerPool[Served] | None = None
    counts: Counter[str] = field(default_factory=Counter, init=False)
    numbers: dict[str, float] = field(default_factory=dict, init=False)
    failures: list[Failure] = field(default_factory=list, init=False)
    _deadline_s: float = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self.limit(60 * self.minutes)

    def scaled(self, full: int, *, at_least: int = 1) -> int:
        """Returns this trial's part of a full count, by the run's minutes and families."""
        return max(min(full, at_least), min(full, round(full * self.minutes / _FULL_MINUTES / self.num_families)))

    def limit(self, duration_s: float) -> None:
        """Ends the row's loops after this time; the row's counts say how much was run."""
        self._deadline_s = time.monotonic() + duration_s

    def not_counted(self, duration_s: float) -> None:
        """Extends the row's time by that of a server's start or of the fixed chats."""
        self._deadline_s += duration_s

    def is_over(self) -> bool:
        """Returns whether the row's time is over."""
        return time.monotonic() > self._deadline_s

    def random(self, *parts: object) -> random.Random:
        """Returns a generator that depends only on seed, family and these parts."""
        return random.Random(repr((self.seed, self.family, *parts)))

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to a count; from any thread."""
        with self._lock:
            self.counts[name] += amount

    def highest(self, name: str, value: float) -> None:
        """Stores a number unless an earlier value of this name is larger."""
        self.numbers[name] = max(value, self.numbers.get(name, 0.0))

    def send(self, server: SglangServer, path: str, body: bytes | dict[str, Any], *, timeout_s: float) -> Reply:
        """Calls `send`, counts the answer by its status, and returns it; from any thread."""
        reply = send(server, path, body, timeout_s=timeout_s)
        self.count_answer(reply)
        return reply

    def count_answer(self, reply: Reply) -> None:
        """Counts an answer by its status; from any thread."""
        self.count(f"answers_{reply.status // 100}xx" if reply.status else "answers_none")

    def fail(self, what: str, reproduction: str) -> None:
        """Reports a failure; from any thread."""
        with self._lock:
            self.failures.append(Failure(what, reproduction))
            is_first = sum(failure.what == what for failure in self.failures) == 1
        if is_first:
            self.step(f"FAILED: {what} ({reproduction[:300]})")

    @contextlib.contextmanager
    def served(self, *flags: str, **environment: str) -> Iterator[SglangServer]:
        """Yields a server with these flags, which is checked after the block."""
        if self.pool is None:
            raise RuntimeError("a trial without a pool has no servers of its own: use checked()")
        start_s = time.monotonic()
        self.step("waiting for a server")
        server = self.pool.get(Served(self.family, self.folder, flags, tuple(sorted(environment.items()))))
        self.not_counted(time.monotonic() - start_s)
        with self.checked(server):
            yield server
        if not server.is_alive():
            self.pool.stop_all()

    @contextlib.contextmanager
    def checked(self, server: SglangServer) -> Iterator[None]:
        """Compares a server after the block with the same server before it.

        It must be alive, the logprobs of the fixed chats must be within 5e-6 of those before, and no request may be
        left in it. During the block, a server that takes more than 8 GB is ended, which is a failure.
        """
        start_s = time.monotonic()
        before = ask_fixed_chats(server, self.family)
        self.not_counted(time.monotonic() - start_s)
        with self._watched(server):
            yield
        if not server.is_alive():
            self.fail("the server ended", server.log_end()[-1500:])
            return
        try:
            difference = largest_difference(before, ask_fixed_chats(server, self.family))
        except Exception as error:  # whatever the client raises: the chats are not answered
            self.fail("the fixed chats are not answered afterwards", f"{type(error).__name__}: {error}"[:500])
            return
        self.count("fixed_chats", len(before))
        self.highest("largest_difference", difference)
        if not difference <= TOLERANCE:
            self.fail(f"the fixed chats differ by more than {TOLERANCE:g}", f"by {difference:.3g}, seed {self.seed}")
        # SGLang flushes only while it holds no request.
        reply = send(server, f"/flush_cache?timeout={_IDLE_TIMEOUT_S}", b"", timeout_s=_IDLE_TIMEOUT_S + 30)
        if reply.status != 200:
            self.fail("requests are left in the server", f"/flush_cache: {reply.status} {reply.text[:300]}")

    @contextlib.contextmanager
    def _watched(self, server: SglangServer) -> Iterator[None]:
        done = threading.Event()
        peak_bytes = 0

        def watch() -> None:
            nonlocal peak_bytes
            while not done.wait(0.2):
                size_bytes = resident_bytes(server)
                peak_bytes = max(peak_bytes, size_bytes)
                if size_bytes > _MAX_SERVER_BYTES:
                    self.fail("the server took more than 8 GB and was ended", f"{size_bytes / 2**30:.1f} GB")
                    for process in process_tree(server.process_id):
                        with contextlib.suppress(psutil.Error):
                            process.kill()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            if peak_bytes:
                self.highest("peak_memory_mb", round(peak_bytes / 2**20, 1))


def resident_bytes(server: SglangServer) -> int:
    """Returns the resident memory of all of a server's processes."""
    try:
        return sum_resident_bytes(process_tree(server.process_id))
    except ServerError:
        return 0
