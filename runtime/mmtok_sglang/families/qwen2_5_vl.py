"""Qwen2.5-VL on SGLang's own implementation: window-ordered features, M-RoPE positions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import MethodName
from mmtok_sglang.cache_key import keys_of
from mmtok_sglang.failures import failures
from mmtok_sglang.families.base import Family
from mmtok_sglang.feature_cache import FeatureCache, Features
from mmtok_sglang.hooks import Hook
from mmtok_sglang.placeholders import plan_of
from mmtok_sglang.positions import PositionWriter, bound_by_positions
from mmtok_sglang.refusals import refusal
from mmtok_sglang.selection import ImageTokens, TokenSelector, without_non_finite
from mmtok_sglang.settings import Settings
from mmtok_sglang.smaller_images import ProcessorSizes
from mmtok_sglang.stages import StageMetrics
from mmtok_sglang.typed_placeholders import PlaceholderRule

__all__ = ["Qwen25VL"]

# Of an image of 2048 x 2048 pixels, the largest that a CPU's server takes by default.
_MAX_PATCHES = (2048 // 14) ** 2

_MODEL = "models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration"


class Qwen25VL(Family):
    """Any number of tokens an image; kept tokens keep their original (t, h, w) positions."""

    architecture = "Qwen2_5_VLForConditionalGeneration"
    model_impl = "sglang"
    placeholder = "<|image_pad|>"
    # The one of SGLang's processor, whose `<image>` is for prompts of /generate.
    placeholder_rule = PlaceholderRule(
        re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>"),
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    )
    processor_hook = (
        "multimodal.processors.qwen_vl.QwenVLImageProcessor.process_mm_data_async",
        "self image_data input_text request_obj *args **kwargs",
    )

    keys_dtype = torch.float32  # means over 2x2 merge groups

    def num_kept(self, item: Any, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns what the budget keeps of the image.

        Raises:
            ValueError: The prompt's placeholders are not those of the image (HTTP 400).
        """
        expected = int(item.image_grid_thw.prod(-1).sum()) // config.vision_config.spatial_merge_size**2
        if num_tokens != expected:
            raise refusal("placeholders", f"the prompt has {num_tokens} placeholders for an image of {expected} tokens")
        return budget.num_kept(num_tokens)

    def vision_width(self, config: Any) -> int:
        """Returns D: the merger's output."""
        return int(config.vision_config.out_hidden_size)

    def keys_width(self, config: Any) -> int:
        """Returns d: the last block's output."""
        return int(config.vision_config.hidden_size)

    def obstacle_to(self, method: MethodName, config: Any) -> str | None:
        """Returns why the model cannot run a method."""
        return None if method == "downsample" else super().obstacle_to(method, config)

    async def shrink_images(
        self, images: Sequence[Any], budget: Budget, settings: Settings, processor: Any, request: Any
    ) -> Sequence[Any]:
        """Returns the images scaled down to the budget, before the processor: what a client would send instead.

        Raises:
            ValueError: Fewer tokens than the processor enlarges an image to, or images that the caller names by a hash
                of their own: SGLang would take a smaller one for the whole (HTTP 400).
        """
        for name in ("mm_hashes", "mm_content_hashes"):
            if any(getattr(request, name, None) or ()):
                # SGLang moves the `content_hash` of an image to the request.
                in_images = name == "mm_content_hashes" and any(getattr(each, "content_hash", None) for each in images)
                sent = "content_hash" if in_images else name
                raise refusal(
                    "downsample", f"mmtok_method downsample changes the images, which {sent} names: send no {sent}"
                )
        sizes = ProcessorSizes.of(processor)
        return [await asyncio.to_thread(sizes.shrink, image, budget, settings.min_tokens_in) for image in images or ()]

    def model_hooks(self, cache: FeatureCache, selector: TokenSelector, stages: StageMetrics) -> list[Hook]:
        """Returns the hooks on encoder, position writing and pipeline hand-over."""
        positions = PositionWriter(selector, failures())

        def get_image_feature(original: Callable[..., Tensor], model: Any, items: list[Any]) -> Any:
            parts = list(_parts(items)) if next(model.parameters()).device.type == "cpu" else [items]
            if len(parts) > 1:
                features = [get_image_feature(original, model, part) for part in parts]
                return [
                    each
                    for part, found in zip(parts, features, strict=True)
                    for each in (found if isinstance(found, list) else found.split([_num_rows(item) for item in part]))
                ]
            encode = partial(stages.encode, original)
            if not any(plan_of(item) for item in items):
                return encode(model, items)
            features = cache.recall(items, lambda missing: _encode(encode, model, missing))
            return _select(selector, model, items, features)

        return [
            Hook(f"{_MODEL}.get_image_feature", "self items", get_image_feature),
            Hook("managers.scheduler.Scheduler.init_req_max_new_tokens", "self req", bound_by_positions),
            Hook(
                "managers.mm_utils.prepare_mm_inputs",
                "input_ids forward_batch language_model kwargs multimodal_model data_embedding_funcs "
                "placeholder_tokens use_deepstack feature_dtypes",
                positions.prepare_mm_inputs,
            ),
            Hook(
                f"{_MODEL}.forward",
                "self input_ids positions forward_batch input_embeds get_embedding pp_proxy_tensors",
                positions.forward,
            ),
        ]


def _parts(items: Sequence[Any]) -> Iterator[list[Any]]:
    """Gives the images that the encoder takes at a time on a CPU, where its attention is of all patches by all."""
    part: list[Any] = []
    num_patches = 0
    for item in items:
        more = int(item.image_grid_thw.prod(-1).sum())
        if part and num_patches + more > _MAX_PATCHES:
            yield part
            part, num_patches = [], 0
        part.append(item)
        num_patches += more
    yield part


def _num_rows(item: Any) -> int:
    return sum(end - start + 1 for start, end in item.offsets)


def _encode(encode: Callable[..., Tensor], model: Any, items: list[Any]) -> list[Features]:
    """Returns the features of each image, pruned or not, from one call of the encoder."""
    before_merger: list[Tensor] = []
    hook = model.visual.merger.register_forward_pre_hook(lambda _, inputs: before_merger.append(inputs[0]))
    try:
        vision = encode(model, items)
    finally:
        hook.remove()
    keys = _raster_keys(model.visual, before_merger[0], torch.cat([item.image_grid_thw for item in items]))
    counts = [int(item.image_grid_thw.prod(-1).sum()) // model.visual.spatial_merge_unit for item in items]
    return [Features(*each) for each in zip(vision.split(counts), keys.split(counts), strict=True)]


def _select(selector: TokenSelector, model: Any, items: Sequence[Any], features: Sequence[Features]) -> list[Tensor]:
    """Returns the kept tokens of each image, all tokens of one without a plan."""
    images = {
        place: ImageTokens(names, plan, each.vision, each.keys, plan.num_kept)
        for place, (item, each) in enumerate(zip(items, features, strict=True))
        if (plan := plan_of(item)) is not None and (names := keys_of(item)) is not None
    }
    kept = dict(zip(images, selector.select(list(images.values()), model.get_input_embeddings()), strict=True))
    return [
        without_non_finite(each.vision[kept[place]]) if place in kept else each.vision
        for place, each in enumerate(features)
    ]


def _raster_keys(visual: Any, before_merger: Tensor, grids: Tensor) -> Tensor:
    """Returns [N, d] float32: the last block's output, averaged over each 2x2 merge group, in raster order.

    Source: Ironieser/MMTok mmtok/qwen/modeling_qwen2_5_vl_mmtok.py; the encoder works in window order.
    """
    groups = before_merger.reshape(-1, visual.spatial_merge_unit, before_merger.shape[-1]).float().mean(dim=1)
    window_order, _ = visual.get_window_index(grids)
    return groups[torch.argsort(window_order).to(groups.device, non_blocking=True)]
