"""The constants that the authors ship, by model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.guidance import GuidanceRule

__all__ = ["PRESETS", "BudgetRule", "Preset"]

BudgetRule = Literal["image", "tile"]


@dataclass(frozen=True, slots=True)
class Preset:
    """What a family uses where the user says nothing else.

    Args:
        config: Temperatures, weight and coverage.
        guidance: How the guidance words are taken from the question.
        budget_rule: "image": a budget is of the image's tokens. "tile": every tile of an image keeps the same number;
            a count is what the largest image keeps in all (160 is 32 of each of 5 tiles), a ratio is of each tile.
    """

    config: SelectionConfig
    guidance: GuidanceRule
    budget_rule: BudgetRule = "image"


PRESETS: dict[str, Preset] = {
    "llava-1.5": Preset(SelectionConfig(tv_temp=0.02, vv_temp=0.2, alpha=0.5), "keywords"),
    "llava-next": Preset(SelectionConfig(tv_temp=0.02, vv_temp=0.2, alpha=0.5), "keywords", "tile"),
    "qwen2.5-vl": Preset(SelectionConfig(tv_temp=0.01, vv_temp=0.2, alpha=0.5), "question"),
}
