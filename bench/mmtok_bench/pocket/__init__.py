"""Pocket models: small vision-language models that answer questions about scenes and pages drawn here.

`scenes` and `pages` draw them, and `questions` asks about them; `checkpoints` holds what `bench/pocket_training`
trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from mmtok_bench.families import FamilyName, PocketFamily
from mmtok_bench.pocket.scenes import SCENE_PX

__all__ = ["PAGE_READER", "PICTURE_PX", "pocket_checkpoint"]

PICTURE_PX: Mapping[FamilyName, int] = {"llava-1.5": SCENE_PX, "qwen2.5-vl": 392}
"""Side of the square pictures that are sent to a served model; a picture has 196 tokens."""

PAGE_READER: PocketFamily = "qwen2.5-vl"
"""The family whose pocket model was also trained to read pages, in a checkpoint of its own."""


def pocket_checkpoint(family: FamilyName, *, reads_pages: bool = False) -> Path:
    """Returns the folder of the trained model in this package.

    Args:
        family: The model's family.
        reads_pages: The model that reads pages, not the one that sees scenes.

    Raises:
        ValueError: There is no such model of the family.
    """
    if family not in get_args(PocketFamily):
        raise ValueError(f"there is no pocket model of {family}, only of {', '.join(get_args(PocketFamily))}")
    if reads_pages and family != PAGE_READER:
        raise ValueError(f"no pocket model of {family} reads pages, only that of {PAGE_READER}")
    return Path(__file__).resolve().parent / "checkpoints" / (f"{family}-pages" if reads_pages else family)
