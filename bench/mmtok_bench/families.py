"""The model families that are measured, and how they differ for a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mmtok_deploy.methods import MethodName

__all__ = ["FAMILY_TRAITS", "FamilyName", "FamilyTraits", "PocketFamily", "family_arguments"]

FamilyName = Literal[
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "qwen3-vl-moe",
    "qwen3.5",
    "qwen3.5-moe",
    "llava-1.5",
    "llava-next",
    "internvl3",
    "glm-4.1v",
    "glm-4.5v",
]
PocketFamily = Literal["llava-1.5", "qwen2.5-vl"]
"""The families of which this package contains a trained model."""


@dataclass(frozen=True, slots=True)
class FamilyTraits:
    """Properties of a family that a benchmark needs.

    Args:
        placeholder: Text that stands for one image in a prompt.
        impossible_methods: Methods that its models cannot run.
        token_px: Side in pixels of the square that one token covers, if smaller images have fewer tokens; None if the
            encoder reads squares of one size.
        arguments: Server arguments that the family needs to be served or pruned.
    """

    placeholder: str
    impossible_methods: tuple[MethodName, ...] = ()
    token_px: int | None = None
    arguments: tuple[str, ...] = ()


# SGLang 0.5.23's own LLaVA-1.5 does not load (models/llava.py, line 788), and LLaVA-NeXT has no other.
_TRANSFORMERS = ("--model-impl=transformers",)
# These encoders have no class token, whose attention VisionZip ranks by.
_QWEN2_VL = FamilyTraits("<|image_pad|>", impossible_methods=("visionzip",), token_px=28)
_GLM = FamilyTraits("<|image|>", impossible_methods=("visionzip",), token_px=28)
_QWEN3_VL = FamilyTraits("<|image_pad|>", impossible_methods=("visionzip",), token_px=32)

FAMILY_TRAITS: Mapping[FamilyName, FamilyTraits] = {
    "qwen2-vl": _QWEN2_VL,
    "qwen2.5-vl": _QWEN2_VL,
    "qwen3-vl": _QWEN3_VL,
    "qwen3-vl-moe": _QWEN3_VL,
    "qwen3.5": _QWEN3_VL,
    "qwen3.5-moe": _QWEN3_VL,
    "llava-1.5": FamilyTraits("<image>", arguments=_TRANSFORMERS),
    # Its tiles have one size.
    "llava-next": FamilyTraits("<image>", impossible_methods=("downsample",), arguments=_TRANSFORMERS),
    "internvl3": FamilyTraits("<image>", impossible_methods=("visionzip", "downsample")),
    "glm-4.1v": _GLM,
    "glm-4.5v": _GLM,
}


def family_arguments(family: FamilyName | None) -> tuple[str, ...]:
    """Returns the server arguments that the family needs to be served or pruned; none if the family is not known."""
    return () if family is None else FAMILY_TRAITS[family].arguments
