"""Where a request's time goes: its images in the tokenizer process; encoder and language model in the scheduler's.

The selection, which comes between the last two, is timed by `metrics`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mmtok_sglang.metrics import Clock, collectors, never_raises, start_clock
from mmtok_sglang.ranks import is_first_rank

__all__ = ["StageMetrics", "image_stage", "observe_image_stage"]


ImageStage = Literal["decode", "preprocess", "hash", "transport"]


@contextmanager
def image_stage(name: ImageStage) -> Iterator[None]:
    """Times what the block does for a request's images in the tokenizer process; what raises is not counted.

    The block is the work itself, in the thread that does it, without the wait for a free thread: added up over all
    requests, it says how busy the process is.
    """
    start_s = time.perf_counter()
    yield
    observe_image_stage(name, 1000 * (time.perf_counter() - start_s))


@never_raises
def observe_image_stage(name: ImageStage, milliseconds: float) -> None:
    """Counts the time of a stage that `image_stage` cannot be put around."""
    collectors()[f"image_{name}_milliseconds"].observe(milliseconds)


@dataclass(frozen=True, slots=True)
class _Part:
    """A stopped clock whose device may still be at work, its histogram, and what to count once it is done."""

    histogram: str
    clock: Clock
    counts: Mapping[str, int]


class StageMetrics:
    """Times encoder calls and language model prefills, pruned or not; one a scheduler process.

    The first rank of a tensor-parallel group reports for all; with pipeline parallelism each stage reports its part.
    Nothing here waits: what an accelerator is done with is looked up with every later batch, decoding included.
    """

    def __init__(self) -> None:
        self._parts: deque[_Part] = deque()
        self._prefill: Clock | None = None
        self._counts: dict[str, int] = {}

    def encode(self, original: Callable[..., Any], model: Any, items: Sequence[Any]) -> Any:
        """Returns `original(model, items)`, one call of the vision encoder with its projector, and times it."""
        if not is_first_rank():
            return original(model, items)
        clock = start_clock(next(model.parameters()).device)
        features = original(model, items)
        self._stop("vision_encoder_milliseconds", clock, {"vision_encoder_images": len(items)})
        return features

    @never_raises
    def start_language_model(self, device: torch.device) -> None:
        """Says that the images of the prefill that runs are embedded: the language model begins."""
        if self._prefill is not None:
            # A prefill that cannot be timed is left out.
            self._prefill = None
            self._prefill = start_clock(device)

    def forward(self, run: Callable[[], Any], forward_batch: Any, device: torch.device) -> Any:
        """Returns `run()`, a prefill of the model; times what comes after the embedding of images, up to the logits.

        Args:
            run: Runs the batch.
            forward_batch: SGLang's batch.
            device: The model's.
        """
        if not is_first_rank():
            return run()
        self._start_prefill(forward_batch, device)
        try:
            output = run()
            if self._prefill is not None:
                self._stop("language_prefill_milliseconds", self._prefill, self._counts)
        finally:
            self._prefill = None
        return output

    @never_raises
    def _start_prefill(self, forward_batch: Any, device: torch.device) -> None:
        self._counts = {
            "language_prefill_requests": int(forward_batch.batch_size),
            # Not what a padded batch says of itself.
            "language_prefill_tokens": sum(forward_batch.extend_seq_lens_cpu or ()),
        }
        self._prefill = start_clock(device)

    @never_raises
    def _stop(self, histogram: str, clock: Clock, counts: Mapping[str, int]) -> None:
        clock.stop()
        self._parts.append(_Part(histogram, clock, counts))
        self.settle()

    @never_raises
    def settle(self) -> None:
        """Reports what the device is done with by now; called with every batch, decoding included."""
        while self._parts and self._parts[0].clock.is_done():
            part = self._parts.popleft()
            collectors()[part.histogram].observe(part.clock.elapsed_ms())
            for name, amount in part.counts.items():
                collectors()[name].inc(amount)
