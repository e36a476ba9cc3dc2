"""The server behind the page: one that the page starts, or one that is running already."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mmtok_bench.server import ServerError, SglangServer, fetch, server_info

__all__ = ["RunningServer", "Served", "StartedServer", "State"]

_ANSWER_TIMEOUT_S = 5.0
# Several tabs request the state; the server is asked at most once in this time.
_STATE_HELD_S = 1.0


@dataclass(frozen=True, slots=True)
class State:
    """State of a server.

    Args:
        name: "starting", "ready", or "stopped" for a server that died or does not answer.
        message: The state in a sentence.
        waited_s: Seconds since its start.
        log: The end of its log, if the page started it and it died.
        can_restart: Whether the page can restart it.
    """

    name: Literal["starting", "ready", "stopped"]
    message: str
    waited_s: float = 0.0
    log: str = ""
    can_restart: bool = False


class StartedServer:
    """A server that the page starts in the background and can restart; it ends with the `with` block.

    Args:
        make: Returns the server, not started yet.
    """

    def __init__(self, make: Callable[[], SglangServer]) -> None:
        self._make = make
        self._server: SglangServer | None = None
        self._failure: str | None = None
        self._started_s = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> StartedServer:
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            if self._server is not None:
                self._server.stop()

    @property
    def url(self) -> str:
        """The address of the server that was started last."""
        assert self._server is not None
        return self._server.url

    def state(self) -> State:
        """Returns the server's current state."""
        with self._lock:
            server = self._server
            assert server is not None
            if server.start_s is not None and self._failure is None and not server.is_alive():
                self._failure = server.log_end()
            if self._failure is not None:
                began = "ended" if server.start_s is not None else "did not start"
                message = f"The server {began}. Nothing of your page is lost: restart it."
                return State("stopped", message, log=self._failure, can_restart=True)
            if server.start_s is None:
                return State("starting", "The server is starting.", waited_s=time.monotonic() - self._started_s)
            return State("ready", "The server is ready.")

    def restart(self) -> None:
        """Restarts the server if it died; of several calls at once, only the first does."""
        if self.state().name == "stopped":
            self._start()

    def _start(self) -> None:
        with self._lock:
            if self._server is not None:
                if self._failure is None:
                    return  # another call has restarted it
                self._server.stop()
            self._failure, self._started_s = None, time.monotonic()
            self._server = self._make()
            self._server.start()
            threading.Thread(target=self._wait, args=(self._server,), daemon=True, name="server-start").start()

    def _wait(self, server: SglangServer) -> None:
        try:
            server.wait_until_ready()
        except ServerError as error:
            with self._lock:
                if server is self._server:
                    self._failure = str(error)


class RunningServer:
    """A server that is running already; the page neither starts nor ends it.

    Args:
        url: Its address, without a path.

    Raises:
        ServerError: It does not answer, or is not an SGLang server that prunes.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.info = server_info(self.url, prunes=True)
        self._state = State("ready", "The server is ready.")
        self._asked_s = time.monotonic()
        self._lock = threading.Lock()

    def state(self) -> State:
        """Returns the server's state, at most a second old."""
        with self._lock:
            if time.monotonic() - self._asked_s > _STATE_HELD_S:
                self._state = self._ask()
                self._asked_s = time.monotonic()
            return self._state

    def _ask(self) -> State:
        try:
            fetch(f"{self.url}/health", timeout_s=_ANSWER_TIMEOUT_S)
            if self._state.name == "stopped" and _identity(server_info(self.url)) != _identity(self.info):
                return State("stopped", f"Another model is served at {self.url} now: start this page's program anew.")
        except ServerError:
            message = f"The server at {self.url} does not answer. This page did not start it, and waits for it."
            return State("stopped", message)
        return State("ready", "The server is ready.")

    def restart(self) -> None:
        """Raises ServerError: the page did not start it."""
        raise ServerError(f"the server at {self.url} was not started by this page: start it where it runs")


Served = StartedServer | RunningServer
"""A server, started by the page or not."""


def _identity(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if name == "model_path" or name.startswith("mmtok_")}
