"""Qwen2-VL on SGLang's own implementation: an encoder without attention windows, and Qwen2.5-VL's positions."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.models import qwen2_vl
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from mmtok_sglang.families.qwen import Qwen, QwenModel, QwenProcessor

__all__ = ["Qwen2VL"]


class Qwen2VLForConditionalGeneration(QwenModel, qwen2_vl.Qwen2VLForConditionalGeneration):
    """The model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pp_group = self.model.pp_group


class Qwen2VLProcessor(QwenProcessor, QwenVLImageProcessor):
    """The processor."""

    models: ClassVar[list[type]] = [Qwen2VLForConditionalGeneration]


class Qwen2VL(Qwen):
    """Tokens of 28 x 28 pixels."""

    model_class = Qwen2VLForConditionalGeneration
    processor_class = Qwen2VLProcessor

    def obstacle_to_stages(self, num_stages: int, config: Any) -> str | None:
        """Returns why it cannot be a pipeline: SGLang's class of it runs all layers."""
        return None if num_stages == 1 else "SGLang 0.5.23 has no pipeline stages for it"

    def vision_width(self, config: Any) -> int:
        """Returns D: the merger's output, which its configuration calls the hidden size."""
        return int(config.vision_config.hidden_size)

    def keys_width(self, config: Any) -> int:
        """Returns d: the last block's output."""
        return int(config.vision_config.embed_dim)
