"""An SGLang plugin for tests alone: breakable prefill graphs, and graphs of vision encoders, without a GPU.

SGLang's own runner does all but the recording: it makes static tensors, pads a batch into them and puts a replay in the
place of the language model's forward. What is "captured" is that forward with its arguments; a "replay" calls it with
the same arguments, so that it reads what a CUDA graph would: the static tensors, and no argument of the batch's own.
Likewise for the blocks of an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang.srt.model_executor.runner import prefill_cuda_graph_runner as runner_module
from sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend import BreakableCudaGraphBackend
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import enable_breakable_cuda_graph
from torch import Tensor

from mmtok_sglang import encoder_graphs
from mmtok_soak.second_plugin import plugin_environment
from tests.runtime import replayed_encoders

__all__ = ["ARGUMENTS", "graph_environment", "record_on_host", "register"]

ARGUMENTS = ("--cuda-graph-backend-prefill=breakable", "--disable-decode-cuda-graph")


def graph_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a server on a CPU that replays prefills, if it has ARGUMENTS."""
    return plugin_environment(folder, "mmtok_test_graphs", f"{__name__}:register", Path(__file__).parents[2])


class _Recorded(BreakableCudaGraphBackend):
    """Keeps the language model's forward and its arguments by shape."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._graphs: dict[Any, Callable[[], Any]] = {}

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        with enable_breakable_cuda_graph():
            yield

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], *_: Any, **__: Any) -> None:
        forward_fn()
        model = self._runner.layer_model
        forward = model.forward

        # The runner goes by the signature.
        @wraps(forward)
        def record(*args: Any, **kwargs: Any) -> Any:
            self._graphs[shape_key] = lambda: forward(*args, **kwargs)
            return forward(*args, **kwargs)

        model.forward = record
        try:
            forward_fn()
        finally:
            model.forward = forward

    def replay(self, shape_key: Any, static_forward_batch: Any, **_: Any) -> Any:
        with enable_breakable_cuda_graph():
            return self._graphs[shape_key]()


@contextmanager
def _no_stream(**_: Any) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(stream=None)


def record_on_host(run: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], object], Tensor]:
    """Takes the place of `encoder_graphs.record`: a replay calls `run` again."""
    output = run()
    return lambda: output.copy_(run()), output


def register() -> None:
    """Has SGLang's runner and the plugin's graphs of encoders record on the host."""
    encoder_graphs.are_on = lambda device: True
    encoder_graphs.record = record_on_host
    encoder_graphs.CAPTURABLE += ("sdpa",)
    replayed_encoders.register()
    runner_module.resolve_prefill_backend = _Recorded
    runner_module.graph_capture = _no_stream
    runner_module.get_or_create_global_graph_capture_stream = lambda: None
