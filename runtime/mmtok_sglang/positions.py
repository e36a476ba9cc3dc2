"""M-RoPE positions of kept tokens: each token keeps the (t, h, w) position it has without pruning.

Text goes on where it would without pruning, too. So a request may have fewer tokens than positions, of which the model
has as many as its context is long, while SGLang counts tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmtok_sglang.cache_key import check_embeddings, keys_of
from mmtok_sglang.failures import Failures, drop_cached_embedding
from mmtok_sglang.placeholders import ImagePlan, plan_of
from mmtok_sglang.refusals import count_refusal
from mmtok_sglang.selection import TokenSelector

__all__ = ["PositionWriter", "bound_by_positions"]

_PROXY_KEY = "mmtok_mrope_positions"


@dataclass(frozen=True, slots=True)
class _Span:
    """The part of one pruned image's K placeholders that a prefill chunk holds.

    Args:
        key: What the image's selection is remembered by.
        name: The image's name in SGLang's cache of embeddings.
        plan: Its plan, with the original positions.
        first: [3, 1] int64, where the image's first token stands in the request. A later turn of a session counts on
            from the turns before it, which the plan does not know.
        kept: Which of the K kept tokens are in the chunk.
        batch: Where they stand in the batch's tokens.
    """

    key: tuple[bytes | None, int]
    name: int
    plan: ImagePlan
    first: Tensor
    kept: slice
    batch: slice


class PositionWriter:
    """Writes the kept tokens' positions into each prefill batch; one a scheduler process.

    Args:
        selector: Remembers what was kept.
        failures: Ends the requests of an image that was not selected; without it, that is an error.
    """

    def __init__(self, selector: TokenSelector, failures: Failures | None = None) -> None:
        self._selector = selector
        self._failures = failures

    def prepare_mm_inputs(
        self,
        prepare: Callable[..., Any],
        input_ids: Tensor,
        forward_batch: Any,
        language_model: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Returns SGLang's input embeddings after correcting the batch's positions in place.

        Hooks: sglang 0.5.23 srt/managers/mm_utils.py prepare_mm_inputs: the selection is known after it, and the
        language model has not read the positions yet. Can go when embedding functions may return positions.
        """
        # The call ends by dropping the batch's multimodal inputs, so what is to be written is found before it.
        spans = []
        if language_model.pp_group.is_first_rank:
            if _has_images(forward_batch):
                check_embeddings(forward_batch)
            spans = list(_spans(forward_batch))
        for span in spans:
            if self._selector.remembered(span.key) is None:
                # A cached embedding whose selection is forgotten has no positions: have the image encoded again.
                drop_cached_embedding(span.name)
        embeddings = prepare(input_ids, forward_batch, language_model, *args, **kwargs)
        positions = forward_batch.mrope_positions
        for span in spans:
            kept = self._selector.remembered(span.key)
            if kept is None or span.plan.positions is None:
                self._fail(span.name, "is in this batch, but was not selected")
                continue
            # Neither copy waits: the kept indices are on the device, the N positions on the host.
            original = (span.plan.positions - span.plan.positions[:, :1] + span.first).to(
                positions.device, non_blocking=True
            )
            positions[:, span.batch] = original[:, kept[span.kept]]
        return embeddings

    def _fail(self, key: int, why: str) -> None:
        if self._failures is None:
            raise RuntimeError(f"MMTok: the image {key:#x} {why}")
        # One whose features failed has no selection, and is marked already.
        if not self._failures.is_marked(key):
            self._failures.mark(key, f"an image {why}")

    def forward(self, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the model, handing corrected positions from each pipeline stage to the next.

        Only the first stage encodes and selects; the others would go on with uncorrected positions.

        Hooks: sglang 0.5.23 srt/models/qwen2_5_vl.py Qwen2_5_VLForConditionalGeneration.forward. Can go when proxy
        tensors carry positions.
        """
        forward_batch = args[2] if len(args) > 2 else kwargs["forward_batch"]
        received = kwargs.get("pp_proxy_tensors")
        if received is not None and _PROXY_KEY in received.tensors:
            forward_batch.mrope_positions.copy_(received.tensors.pop(_PROXY_KEY))
        result = original(model, *args, **kwargs)
        if not model.pp_group.is_last_rank and forward_batch.forward_mode.is_extend():
            result.tensors[_PROXY_KEY] = forward_batch.mrope_positions.clone()
        return result


def bound_by_positions(original: Callable[..., None], scheduler: Any, req: Any) -> None:
    """Bounds what a request generates as SGLang does, and so that its positions end with the model's context, too.

    A prompt whose positions leave it is refused (HTTP 400): looked up in the rotary embedding's table, they would end
    the server.

    Hooks: sglang 0.5.23 srt/managers/scheduler.py Scheduler.init_req_max_new_tokens, which every request goes through
    once its images and, in a session, the turns before are known. Can go when SGLang bounds positions.
    """
    inputs, params = req.multimodal_inputs, req.sampling_params
    if inputs is not None and inputs.mrope_position_delta is not None:
        context = scheduler.model_config.context_len
        end = len(req.origin_input_ids) + int(inputs.mrope_position_delta.max())
        if end >= context:
            count_refusal("positions")
            req.set_finish_with_abort(
                f"MMTok: the request's images and text span {end} positions, more than the model's context of "
                f"{context}: send fewer or smaller images"
            )
        else:
            room = context - 1 - end
            params.max_new_tokens = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
    original(scheduler, req)


def _has_images(forward_batch: Any) -> bool:
    mode = forward_batch.forward_mode
    return not (mode.is_decode() or mode.is_target_verify()) and bool(forward_batch.contains_mm_inputs())


def _spans(forward_batch: Any) -> Iterator[_Span]:
    if not _has_images(forward_batch):
        return
    batch_start = 0
    for inputs, chunk_start, chunk_len in zip(
        forward_batch.mm_inputs, forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True
    ):
        for item in inputs.mm_items if inputs is not None else []:
            plan, keys = plan_of(item), keys_of(item)
            if plan is None or keys is None:
                continue
            ((start, end),) = item.offsets
            first, stop = max(start, chunk_start), min(end + 1, chunk_start + chunk_len)
            if first < stop:
                shift = batch_start - chunk_start
                yield _Span(
                    *((keys.selection, 0), item.hash, plan, inputs.mrope_positions[:, start : start + 1]),
                    kept=slice(first - start, stop - start),
                    batch=slice(first + shift, stop + shift),
                )
        batch_start += chunk_len
