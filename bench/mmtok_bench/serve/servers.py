"""The servers of one model: made with equal flags, all at once or one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from mmtok_bench.families import family_arguments
from mmtok_bench.process_tree import sigterm_raises_exit
from mmtok_bench.serve.dummy_models import DUMMY_ARGUMENTS
from mmtok_bench.serve.plan import Side
from mmtok_bench.serve.presets import ServedModel, Sweep
from mmtok_bench.server import ServerError, SglangServer, cpu_arguments, cpu_environment

__all__ = ["ServerPool", "make_server"]

_START_TIMEOUT_S = 900.0


def make_server(sweep: Sweep, model: ServedModel, side: Side, model_path: Path, log: Path) -> SglangServer:
    """Returns a server that is not started yet; two sides of a model differ by `side.arguments` alone."""
    on_cpu = sweep.device == "cpu"
    return SglangServer(
        model_path,
        *(cpu_arguments() if on_cpu else ()),
        *("--enable-metrics", "--enable-cache-report"),
        *sweep.arguments,
        *family_arguments(model.family),
        *(DUMMY_ARGUMENTS if model.model_path is None else ()),
        *side.arguments,
        env=cpu_environment() if on_cpu else {},
        log_path=log,
        start_timeout_s=_START_TIMEOUT_S,
    )


class ServerPool:
    """Servers that are started when they are first asked for, and ended when the `with` block ends.

    Args:
        make: Makes the server of a side.
        side_by_side: Keep all that were started. Otherwise the one before ends when another is asked for.
    """

    def __init__(self, make: Callable[[Side], SglangServer], *, side_by_side: bool) -> None:
        self.dead: dict[Side, str] = {}
        self._make = make
        self._side_by_side = side_by_side
        self._servers: dict[Side, SglangServer] = {}
        self._block = contextlib.ExitStack()

    def __enter__(self) -> ServerPool:
        self._block.enter_context(sigterm_raises_exit())
        self._block.callback(self._stop_all)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.close()

    def start_all(self, sides: Sequence[Side]) -> None:
        """Starts the servers of these sides at once, if they are to run side by side; `get` waits for each."""
        if self._side_by_side:
            for side in sides:
                self._start(side)

    def get(self, side: Side) -> SglangServer:
        """Returns the side's server when it takes requests.

        Raises:
            ServerError: It died, now or before; it is not started again.
        """
        if side in self.dead:
            raise ServerError(self.dead[side])
        if side not in self._servers:
            if not self._side_by_side:
                self._stop_all()
            self._start(side)
        server = self._servers[side]
        try:
            server.wait_until_ready()
        except ServerError as error:
            # A process that is being killed counts as alive for a moment more: whether it is gone is asked afterwards.
            has_died = server.start_s is not None and not server.is_alive()
            died = f"the server at budget {side.budget} died.\n{server.log_end()}"
            self.dead[side] = died if has_died else str(error)
            self._servers.pop(side).stop()
            raise ServerError(self.dead[side]) from error
        return server

    def _start(self, side: Side) -> None:
        self._servers[side] = self._make(side)
        self._servers[side].start()

    def _stop_all(self) -> None:
        for side in list(self._servers):
            self._servers.pop(side).stop()
