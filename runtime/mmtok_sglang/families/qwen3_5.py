"""Qwen3.5, 3.6 and 3.8, dense and mixture of experts, on SGLang's own implementation: Qwen3-VL's encoder and positions.

Most layers of the language model are linear attention (a gated delta rule), whose state is read token by token: kept
tokens go in raster order, as everywhere. The other layers have M-RoPE, as Qwen3-VL has.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.models import qwen3_5
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from mmtok_sglang.families.qwen import QwenModel, QwenProcessor, QwenWithTimestamps

__all__ = ["Qwen35", "Qwen35Moe"]


class Qwen3_5ForConditionalGeneration(QwenModel, qwen3_5.Qwen3_5ForConditionalGeneration):  # noqa: N801
    """The model."""

    replays_encoder = True


class Qwen3_5MoeForConditionalGeneration(QwenModel, qwen3_5.Qwen3_5MoeForConditionalGeneration):  # noqa: N801
    """The model with a mixture of experts."""

    replays_encoder = True


class Qwen35Processor(QwenProcessor, QwenVLImageProcessor):
    """The processor of both."""

    models: ClassVar[list[type]] = [Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration]


class Qwen35(QwenWithTimestamps):
    """Tokens of 32 x 32 pixels."""

    model_class = Qwen3_5ForConditionalGeneration
    processor_class = Qwen35Processor
    replays_prefills = True
    # SGLang's name of the checkpoint's own head (NEXTN).
    speculative_algorithms = ("EAGLE",)
    drafts_are_chains = True

    def obstacle(self, config: Any) -> str | None:
        """Returns why a model of this architecture cannot be pruned: a Qwen3.5 has no DeepStack.

        SGLang 0.5.23 takes Qwen3-VL's levels where config.json says nothing of them (configs/qwen3_vl.py,
        `Qwen3VLVisionConfig`).
        """
        num_levels = len(config.vision_config.deepstack_visual_indexes)
        if num_levels:
            return (
                f"SGLang reads {num_levels} levels of DeepStack in its configuration, and a Qwen3.5 has none: expected "
                '"deepstack_visual_indexes": [] in the vision_config of config.json'
            )
        return super().obstacle(config)


class Qwen35Moe(Qwen35):
    """The same encoder and positions before a mixture of experts."""

    model_class = Qwen3_5MoeForConditionalGeneration
