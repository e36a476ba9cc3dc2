"""The constants that the authors ship, by model family."""

from __future__ import annotations

from dataclasses import dataclass

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.guidance import GuidanceRule

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """The defaults of a model family.

    Args:
        config: Temperatures, weight and coverage.
        guidance: How the guidance words are taken from the question.
    """

    config: SelectionConfig
    guidance: GuidanceRule


# Image tokens are compared by the merger's input, as the authors do. By its output (`--mmtok-keys output`) the pocket
# Qwen2.5-VL reads 10 points more characters at 11% of the tokens: docs/quality.md.
_QWEN = Preset(SelectionConfig(tv_temp=0.01, vv_temp=0.2, alpha=0.5), "question")

PRESETS: dict[str, Preset] = {
    "llava-1.5": Preset(SelectionConfig(tv_temp=0.02, vv_temp=0.2, alpha=0.5), "keywords"),
    "llava-next": Preset(SelectionConfig(tv_temp=0.02, vv_temp=0.2, alpha=0.5), "keywords"),
    "qwen2.5-vl": _QWEN,
    # The authors ship none for these: those of Qwen2.5-VL.
    "qwen2-vl": _QWEN,
    "qwen3-vl": _QWEN,
    "qwen3-vl-moe": _QWEN,
    "qwen3.5": _QWEN,
    "qwen3.5-moe": _QWEN,
    # None is shipped for InternVL either: the same, since its projector also merges 2 x 2 patches before a Qwen.
    "internvl3": _QWEN,
    # Nor for GLM, whose projector merges 2 x 2 patches, too.
    "glm-4.1v": _QWEN,
    "glm-4.5v": _QWEN,
}
