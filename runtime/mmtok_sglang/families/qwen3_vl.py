"""Qwen3-VL, dense and mixture of experts, on SGLang's own implementation: tokens with what DeepStack adds to layers.

The encoder returns rows of H x (1 + levels): a token as the language model reads it, and behind it what its first
layers get added at the token's place, a part a layer (DeepStack). Tokens are selected by their first H values, and rows
are kept whole, so that the levels of a kept token go to its place and no other's do.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.models import qwen3_vl, qwen3_vl_moe
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from mmtok_sglang.families.qwen import Qwen, QwenModel
from mmtok_sglang.processor import PrunedProcessor

__all__ = ["Qwen3VL", "Qwen3VLMoe"]

# SGLang 0.5.23 models/qwen3_vl_moe.py, `Qwen3MoeLLMModel.__init__`: as many layers are given levels, whatever the
# configuration says.
_MOE_LEVELS = 3


class Qwen3VLForConditionalGeneration(QwenModel, qwen3_vl.Qwen3VLForConditionalGeneration):
    """The model."""


class Qwen3VLMoeForConditionalGeneration(QwenModel, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """The model with a mixture of experts."""


class Qwen3VLProcessor(PrunedProcessor, QwenVLImageProcessor):
    """The processor of both."""

    models: ClassVar[list[type]] = [Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration]


class Qwen3VL(Qwen):
    """Tokens of 32 x 32 pixels."""

    model_class = Qwen3VLForConditionalGeneration
    processor_class = Qwen3VLProcessor


class Qwen3VLMoe(Qwen3VL):
    """The same encoder and positions before a mixture of experts."""

    model_class = Qwen3VLMoeForConditionalGeneration

    def obstacle(self, config: Any) -> str | None:
        """Returns why a model of this architecture cannot be pruned: SGLang would lose levels, or read none."""
        levels = len(config.vision_config.deepstack_visual_indexes)
        if levels != _MOE_LEVELS:
            return f"it has {levels} levels of DeepStack, and SGLang adds {_MOE_LEVELS} of a mixture of experts"
        return super().obstacle(config)
