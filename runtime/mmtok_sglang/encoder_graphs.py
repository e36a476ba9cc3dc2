"""Blocks of a vision encoder as CUDA graphs, for images of sizes that come often.

For one image at a time, launching the kernels of the blocks takes longer than running them. SGLang 0.5.23 has graphs of
its own for some encoders (SGLANG_VIT_ENABLE_CUDA_GRAPH=1, srt/multimodal/vit_cuda_graph_runner.py). They are not used
here: a graph is captured at the first image of each size and never freed, the features before the merger stay inside,
and the features that Qwen3-VL returns are overwritten by the next replay.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sglang.srt.environ import envs
from torch import Tensor, nn

from mmtok_sglang.metrics import collectors, never_raises
from mmtok_sglang.ranks import num_ranks

__all__ = ["CAPTURABLE", "MAX_PATCHES", "EncoderGraphs", "are_on", "record"]

logger = logging.getLogger(__name__)

MAX_PATCHES = 4096
"""Patches of an image up to which it is captured; from about as many on, kernels take longer than their launches."""
_MAX_LAYOUTS = 16
# A layout is captured when it is seen for the third time within 32 images: at most ten layouts come so often.
_NUM_RECENT = 32
_MIN_SEEN = 3
CAPTURABLE: tuple[str, ...] = ("triton_attn", "fa3", "fa4")
"""Attention of SGLang's encoders that does not wait for the device."""

_Block = Callable[[Tensor], Tensor]


def are_on(device: torch.device) -> bool:
    """Whether encoders run as CUDA graphs on `device`: on one GPU, unless the user has turned them off."""
    is_off = envs.SGLANG_VIT_ENABLE_CUDA_GRAPH.is_set() and not envs.SGLANG_VIT_ENABLE_CUDA_GRAPH.get()
    return device.type == "cuda" and num_ranks() == 1 and not is_off


def record(run: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], object], Tensor]:
    """Returns a replay of the kernels that `run` launches, and the tensor that each replay writes.

    Args:
        run: Reads and writes the same memory each time.
        pool: The graphs' memory; all of them may share one, since they run one after another.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process may allocate memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output


class _Segment:
    """Consecutive blocks of one layout as a graph.

    Args:
        rows: What goes into the first block; later calls must have its shape.
        blocks: Each with all its other arguments, which depend on the layout alone.
        pool: See `record`.
    """

    def __init__(self, rows: Tensor, blocks: Sequence[_Block], pool: Any) -> None:
        self._input = rows.clone()
        # What the blocks hold must live as long as the graph, which reads it.
        self._blocks = blocks
        # Kernels are compiled by this call, which a capture could not do.
        self._run()
        self._replay, self._output = record(self._run, pool)

    def _run(self) -> Tensor:
        return _through(self._blocks, self._input)

    def __call__(self, rows: Tensor) -> Tensor:
        self._input.copy_(rows)
        self._replay()
        # The next replay of any graph of the pool may overwrite it.
        return self._output.clone()


def _through(blocks: Sequence[_Block], rows: Tensor) -> Tensor:
    for block in blocks:
        rows = block(rows)
    return rows


class EncoderGraphs:
    """Replays the blocks of an encoder for images whose layout comes often; others run as before.

    The encoder's own forward stays in charge. A block that is not the last of a segment returns its input and is only
    noted; the last one runs, or replays, the whole segment.

    Args:
        blocks: The encoder's blocks; each takes hidden states first and returns hidden states of the same shape.
        read: Indices of blocks whose outputs the encoder reads; that of the last is always read.
        is_on: False for an encoder that is never to be captured.
    """

    def __init__(self, blocks: nn.ModuleList, read: Collection[int], *, is_on: bool = True) -> None:
        attention = getattr(getattr(blocks[0], "attn", None), "qkv_backend_name", None)
        self._is_on = is_on and are_on(next(blocks[0].parameters()).device)
        if self._is_on and attention not in (None, *CAPTURABLE):
            self._is_on = False
            logger.warning(
                "MMTok: the vision encoder runs without CUDA graphs: --mm-attention-backend %s cannot be captured, "
                "expected one of %s",
                *(attention, ", ".join(CAPTURABLE)),
            )
        self._ends = {*read, len(blocks) - 1}
        self._pool: Any = None
        self._captured: OrderedDict[Hashable, list[_Segment]] = OrderedDict()
        self._recent: deque[Hashable] = deque(maxlen=_NUM_RECENT)
        # Of the image that is encoded now: its segments, the next of them, and blocks that are noted.
        self._segments: list[_Segment] | None = None
        self._next = 0
        self._noted: list[_Block] = []
        if self._is_on:
            for index, block in enumerate(blocks):
                block.forward = partial(self._run_block, index, block.forward)

    @contextmanager
    def of(self, layout: Hashable | None) -> Iterator[None]:
        """Within it, the encoder is called for one image.

        Args:
            layout: What all arguments of the blocks but the hidden states depend on, the shape of these included. None
                for an image that is not to be captured.
        """
        if layout is None or not self._is_on:
            yield
            return
        self._recent.append(layout)
        captured = self._captured.get(layout)
        if captured is None and self._recent.count(layout) < _MIN_SEEN:
            yield
            return
        start_s = time.perf_counter()
        self._segments, self._next, self._noted = captured or [], 0, []
        try:
            yield
            self._keep(layout, captured is None, start_s)
        finally:
            self._segments = None

    def _keep(self, layout: Hashable, is_new: bool, start_s: float) -> None:
        if self._segments is None:
            return
        self._captured[layout] = self._segments
        self._captured.move_to_end(layout)
        if len(self._captured) > _MAX_LAYOUTS:
            self._captured.popitem(last=False)
        if is_new:
            logger.info(
                "MMTok: the vision encoder is captured for images of layout %s in %.0f ms (%d of at most %d layouts; "
                "SGLANG_VIT_ENABLE_CUDA_GRAPH=0 turns this off)",
                *(layout, 1000 * (time.perf_counter() - start_s), len(self._captured), _MAX_LAYOUTS),
            )
        else:
            _count_replay()

    def _run_block(self, index: int, block: Callable[..., Tensor], rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._segments is None:
            return block(rows, *args, **kwargs)
        self._noted.append(lambda rows: block(rows, *args, **kwargs))
        if index not in self._ends:
            return rows
        blocks, self._noted = self._noted, []
        if self._next == len(self._segments) and not self._capture(rows, blocks):
            return _through(blocks, rows)
        segment = self._segments[self._next]
        self._next += 1
        return segment(rows)

    def _capture(self, rows: Tensor, blocks: Sequence[_Block]) -> bool:
        """Adds a segment; returns False if that fails, and no graph is captured from then on."""
        assert self._segments is not None
        try:
            if self._pool is None and rows.is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            self._segments.append(_Segment(rows, blocks, self._pool))
        except Exception:
            logger.exception("MMTok: the vision encoder cannot be captured, and runs without CUDA graphs from now on")
            self._is_on, self._segments = False, None
            self._captured.clear()
            return False
        return True


@never_raises
def _count_replay() -> None:
    collectors()["vision_encoder_replays"].inc()
