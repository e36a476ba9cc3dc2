"""Qwen3-VL, dense and mixture of experts, on SGLang's own implementation: tokens with what DeepStack adds to layers.

The encoder returns rows of H x (1 + levels): a token as the language model reads it, and behind it what its first
layers get added at the token's place, a part a layer (DeepStack). Tokens are selected by their first H values, and rows
are kept whole, so that the levels of a kept token go to its place and no other's do.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.models import qwen3_vl, qwen3_vl_moe
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from mmtok_sglang.families.qwen import Qwen, QwenModel, QwenProcessor

__all__ = ["Qwen3VL", "Qwen3VLMoe"]

# SGLang 0.5.23 models/qwen3_vl_moe.py, `Qwen3MoeLLMModel.__init__`: as many layers are given levels, whatever the
# configuration says.
_MOE_LEVELS = 3


class Qwen3VLForConditionalGeneration(QwenModel, qwen3_vl.Qwen3VLForConditionalGeneration):
    """The model."""


class Qwen3VLMoeForConditionalGeneration(QwenModel, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """The model with a mixture of experts."""


class Qwen3VLProcessor(QwenProcessor, QwenVLImageProcessor):
    """The processor of both."""

    models: ClassVar[list[type]] = [Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration]


class Qwen3VL(Qwen):
    """Tokens of 32 x 32 pixels."""

    model_class = Qwen3VLForConditionalGeneration
    processor_class = Qwen3VLProcessor

    def obstacle_to_stages(self, num_stages: int, config: Any) -> str | None:
        """Returns why a pipeline would lose levels: the first stage alone is given them.

        SGLang 0.5.23 ends the start of a dense model (models/qwen3_vl.py, `Qwen3LLMModel.__init__`), and serves a
        mixture of experts without them.
        """
        num_layers, num_levels = config.text_config.num_hidden_layers, _num_levels(config)
        _, end = get_pp_indices(num_layers, 0, num_stages)
        if end >= num_levels:
            return None
        return (
            f"DeepStack adds to its first {num_levels} layers, and the first stage would have {end} of {num_layers}: "
            "take fewer stages, or share layers out by SGLANG_PP_LAYER_PARTITION"
        )


class Qwen3VLMoe(Qwen3VL):
    """The same encoder and positions before a mixture of experts."""

    model_class = Qwen3VLMoeForConditionalGeneration

    def obstacle(self, config: Any) -> str | None:
        """Returns why a model of this architecture cannot be pruned: SGLang would lose levels, or look for more."""
        if _num_levels(config) != _MOE_LEVELS:
            return f"it has {_num_levels(config)} levels of DeepStack, and SGLang adds {_MOE_LEVELS}"
        return super().obstacle(config)


def _num_levels(config: Any) -> int:
    return len(config.vision_config.deepstack_visual_indexes)
