"""Qwen2.5-VL on SGLang's own implementation: features in the order of attention windows."""

from __future__ import annotations

from typing import ClassVar

import torch
from sglang.srt.models import qwen2_5_vl
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from torch import Tensor

from mmtok_sglang.families.qwen import Qwen, QwenModel, QwenProcessor

__all__ = ["Qwen25VL"]


class Qwen2_5_VLForConditionalGeneration(QwenModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """The model."""

    def in_raster_order(self, groups: Tensor, grids: Tensor) -> Tensor:
        """Returns the rows in the order of the tokens: the encoder works in window order."""
        window_order, _ = self.visual.get_window_index(grids)
        return groups[torch.argsort(window_order).to(groups.device, non_blocking=True)]


class Qwen2_5_VLProcessor(QwenProcessor, QwenVLImageProcessor):  # noqa: N801
    """The processor."""

    models: ClassVar[list[type]] = [Qwen2_5_VLForConditionalGeneration]


class Qwen25VL(Qwen):
    """Tokens of 28 x 28 pixels."""

    model_class = Qwen2_5_VLForConditionalGeneration
    processor_class = Qwen2_5_VLProcessor
