"""Qwen2.5-VL on SGLang's own implementation: window-ordered features, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmtok_deploy.budget import Budget
from mmtok_deploy.runtime.sglang.families.base import Family
from mmtok_deploy.runtime.sglang.hooks import Hook
from mmtok_deploy.runtime.sglang.placeholders import plan_of
from mmtok_deploy.runtime.sglang.positions import PositionWriter
from mmtok_deploy.runtime.sglang.selection import TokenSelector

__all__ = ["Qwen25VL"]

_MODEL = "models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration"


class Qwen25VL(Family):
    """Any number of tokens an image; kept tokens keep their original (t, h, w) positions."""

    architecture = "Qwen2_5_VLForConditionalGeneration"
    model_impl = "sglang"
    placeholder = "<|image_pad|>"
    processor_hook = (
        "multimodal.processors.qwen_vl.QwenVLImageProcessor.process_mm_data_async",
        "self image_data input_text request_obj args kwargs",
    )

    def num_kept(self, item: Any, num_tokens: int, budget: Budget, config: Any) -> int:
        """Returns what the budget keeps of the image.

        Raises:
            ValueError: The prompt's placeholders are not those of the image (HTTP 400).
        """
        expected = int(item.image_grid_thw.prod(-1).sum()) // config.vision_config.spatial_merge_size**2
        if num_tokens != expected:
            raise ValueError(f"the prompt has {num_tokens} placeholders for an image of {expected} tokens")
        return budget.num_kept(num_tokens)

    def model_hooks(self, selector: TokenSelector) -> list[Hook]:
        """Returns the hooks on encoder, position writing and pipeline hand-over."""
        positions = PositionWriter(selector)

        def get_image_feature(original: Callable[..., Tensor], model: Any, items: list[Any]) -> Any:
            return _encode_and_select(selector, original, model, items)

        return [
            Hook(f"{_MODEL}.get_image_feature", "self items", get_image_feature),
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


def _encode_and_select(
    selector: TokenSelector, encode: Callable[..., Tensor], model: Any, items: list[Any]
) -> Tensor | list[Tensor]:
    plans = [plan_of(item) for item in items]
    if not any(plans):
        return encode(model, items)
    before_merger: list[Tensor] = []
    hook = model.visual.merger.register_forward_pre_hook(lambda _, inputs: before_merger.append(inputs[0]))
    try:
        vision = encode(model, items)
    finally:
        hook.remove()
    keys = _raster_keys(model.visual, before_merger[0], torch.cat([item.image_grid_thw for item in items]))
    counts = [int(item.image_grid_thw.prod(-1).sum()) // model.visual.spatial_merge_unit for item in items]
    embed = model.get_input_embeddings()
    return [
        image if plan is None else image[selector.select(item.hash, plan, image, image_keys, embed)]
        for item, plan, image, image_keys in zip(items, plans, vision.split(counts), keys.split(counts), strict=True)
    ]


def _raster_keys(visual: Any, before_merger: Tensor, grids: Tensor) -> Tensor:
    """Returns [N, d] float32: the last block's output, averaged over each 2x2 merge group, in raster order.

    Source: Ironieser/MMTok mmtok/qwen/modeling_qwen2_5_vl_mmtok.py; the encoder works in window order.
    """
    groups = before_merger.reshape(-1, visual.spatial_merge_unit, before_merger.shape[-1]).float().mean(dim=1)
    window_order, _ = visual.get_window_index(grids)
    return groups[torch.argsort(window_order).to(groups.device)]
