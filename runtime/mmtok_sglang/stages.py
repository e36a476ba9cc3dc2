"""Where a prefill's time goes: the vision encoder and the language model, beside the selection between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmtok_sglang.hooks import Hook
from mmtok_sglang.metrics import Clock, collectors, never_raises, start_clock
from mmtok_sglang.ranks import is_first_rank

__all__ = ["StageMetrics"]


@dataclass(frozen=True, slots=True)
class _Part:
    """A stopped clock whose device may still be at work, its histogram, and what to count once it is done."""

    histogram: str
    clock: Clock
    counts: Mapping[str, int]


class StageMetrics:
    """Times encoder calls and language model prefills, pruned or not; one a scheduler process.

    The first rank of a tensor-parallel group reports for all; with pipeline parallelism each stage reports its part.
    Nothing here waits: what an accelerator is done with is looked up at every later forward, decoding included.
    """

    def __init__(self) -> None:
        self._parts: deque[_Part] = deque()
        self._prefill: Clock | None = None

    def hooks(self) -> list[Hook]:
        """Returns the hooks that time language model prefills."""
        return [
            Hook(
                "managers.mm_utils.embed_mm_inputs",
                "mm_inputs_list extend_prefix_lens extend_seq_lens input_ids input_embedding multimodal_model "
                "data_embedding_func_mapping placeholder_tokens use_deepstack",
                self.embed_mm_inputs,
            ),
            Hook(
                "model_executor.model_runner.ModelRunner.forward",
                "self forward_batch skip_attn_backend_init pp_proxy_tensors reinit_attn_backend split_forward_count",
                self.forward,
            ),
        ]

    def encode(self, original: Callable[..., Any], model: Any, items: Sequence[Any]) -> Any:
        """Returns `original(model, items)`, one call of the vision encoder with its projector, and times it."""
        if not is_first_rank():
            return original(model, items)
        clock = start_clock(next(model.parameters()).device)
        features = original(model, items)
        self._stop("vision_encoder_milliseconds", clock, {"vision_encoder_images": len(items)})
        return features

    def embed_mm_inputs(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns a batch's input embeddings; the language model's prefill begins after them.

        Hooks: sglang 0.5.23 srt/managers/mm_utils.py embed_mm_inputs: encoder, selection and the placing of features.
        Can go when SGLang times the parts of a multimodal prefill.
        """
        embeddings = original(*args, **kwargs)
        if self._prefill is not None:
            self._prefill = start_clock(embeddings[0].device)
        return embeddings

    def forward(self, original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a batch; where it is a prefill, times what comes after the embedding of images, up to the logits.

        Hooks: sglang 0.5.23 srt/model_executor/model_runner.py ModelRunner.forward, for all models and both with and
        without CUDA graphs. Can go when SGLang times the parts of a multimodal prefill.
        """
        self._settle()
        if not (is_first_rank() and forward_batch.forward_mode.is_extend()):
            return original(runner, forward_batch, *args, **kwargs)
        # Read before the call, which may pad the batch.
        counts = {
            "language_prefill_requests": int(forward_batch.batch_size),
            "language_prefill_tokens": int(forward_batch.extend_num_tokens),
        }
        self._prefill = start_clock(torch.device(runner.device))
        try:
            output = original(runner, forward_batch, *args, **kwargs)
            self._stop("language_prefill_milliseconds", self._prefill, counts)
        finally:
            self._prefill = None
        return output

    @never_raises
    def _stop(self, histogram: str, clock: Clock, counts: Mapping[str, int]) -> None:
        clock.stop()
        self._parts.append(_Part(histogram, clock, counts))
        self._settle()

    @never_raises
    def _settle(self) -> None:
        while self._parts and self._parts[0].clock.is_done():
            part = self._parts.popleft()
            collectors()[part.histogram].observe(part.clock.elapsed_ms())
            for name, amount in part.counts.items():
                collectors()[name].inc(amount)
