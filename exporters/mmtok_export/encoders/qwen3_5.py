"""Encoders of Qwen3.5, dense and mixture of experts: that of Qwen3-VL without DeepStack."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

from mmtok_export.encoders.qwen3_vl import Qwen3VLEncoder

__all__ = ["Qwen35Encoder", "Qwen35MoeEncoder"]


class Qwen35Encoder(Qwen3VLEncoder):
    """Encodes images into tokens of 32 x 32 px.

    Source: transformers 5.19 models/qwen3_5/modeling_qwen3_5.py, `Qwen3_5VisionModel`.
    """

    family = "qwen3.5"
    vision_model: ClassVar = Qwen3_5VisionModel


class Qwen35MoeEncoder(Qwen35Encoder):
    """The same encoder for models with a mixture of experts."""

    family = "qwen3.5-moe"
