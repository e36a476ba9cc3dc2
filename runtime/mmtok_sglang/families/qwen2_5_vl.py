"""Qwen2.5-VL on SGLang's own implementation: window-ordered features, M-RoPE positions."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from sglang.srt.models import qwen2_5_vl
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from torch import Tensor

from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import MethodName
from mmtok_sglang.families.base import Family
from mmtok_sglang.feature_cache import Features
from mmtok_sglang.model import PrunedModel
from mmtok_sglang.processor import PrunedProcessor
from mmtok_sglang.refusals import refusal
from mmtok_sglang.settings import Settings
from mmtok_sglang.smaller_images import ProcessorSizes
from mmtok_sglang.typed_placeholders import PlaceholderRule

__all__ = ["Qwen25VL"]

_MAX_PIXELS_ON_CPU = 2048 * 2048
_MAX_PATCHES = _MAX_PIXELS_ON_CPU // 14**2


class Qwen2_5_VLForConditionalGeneration(PrunedModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """The model."""

    def encode(self, items: Sequence[Any]) -> Tensor:
        """Returns the tokens of images; on a CPU by as many images at a time as it has memory for."""
        parts = _parts(items) if next(self.parameters()).device.type == "cpu" else [items]
        features = [super(Qwen2_5_VLForConditionalGeneration, self).encode(part) for part in parts]
        return features[0] if len(features) == 1 else torch.cat(features)

    def features_of(self, items: Sequence[Any]) -> list[Features]:
        """Returns the merger's output as `vision`, and means over what goes into it as `keys`."""
        before_merger: list[Tensor] = []
        hook = self.visual.merger.register_forward_pre_hook(lambda _, inputs: before_merger.append(inputs[0]))
        try:
            vision = self.encode(items)
        finally:
            hook.remove()
        keys = _raster_keys(self.visual, torch.cat(before_merger), torch.cat([item.image_grid_thw for item in items]))
        counts = [int(item.image_grid_thw.prod(-1).sum()) // self.visual.spatial_merge_unit for item in items]
        return [
            Features(*each) for each in zip(vision[None].split(counts, 1), keys[None].split(counts, 1), strict=True)
        ]


class Qwen2_5_VLProcessor(PrunedProcessor, QwenVLImageProcessor):  # noqa: N801
    """The processor."""

    models: ClassVar[list[type]] = [Qwen2_5_VLForConditionalGeneration]


class Qwen25VL(Family):
    """Any number of tokens an image; kept tokens keep their original (t, h, w) positions."""

    model_class = Qwen2_5_VLForConditionalGeneration
    processor_class = Qwen2_5_VLProcessor
    placeholder = "<|image_pad|>"
    # The one of SGLang's processor, whose `<image>` is for prompts of /generate.
    placeholder_rule = PlaceholderRule(
        re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<image>"),
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    )
    keys_dtype = torch.float32  # means over 2x2 merge groups
    # SGLang's attention on a CPU holds a matrix of all patches by all patches: 22 GB for 3584 x 3584 pixels.
    max_pixels_on_cpu = _MAX_PIXELS_ON_CPU

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


def _raster_keys(visual: Any, before_merger: Tensor, grids: Tensor) -> Tensor:
    """Returns [N, d] float32: the last block's output, averaged over each 2x2 merge group, in raster order.

    Source: Ironieser/MMTok mmtok/qwen/modeling_qwen2_5_vl_mmtok.py; the encoder works in window order.
    """
    groups = before_merger.reshape(-1, visual.spatial_merge_unit, before_merger.shape[-1]).float().mean(dim=1)
    window_order, _ = visual.get_window_index(grids)
    return groups[torch.argsort(window_order).to(groups.device, non_blocking=True)]
