"""Pocket models: small vision-language models that answer questions about scenes drawn here.

`scenes` draws them and `questions` asks about them; `checkpoints` holds what `bench/pocket_training` trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from mmtok_bench.families import FamilyName, PocketFamily
from mmtok_bench.pocket.scenes import SCENE_PX

__all__ = ["PICTURE_PX", "pocket_checkpoint"]

PICTURE_PX: Mapping[FamilyName, int] = {"llava-1.5": SCENE_PX, "qwen2.5-vl": 392}
"""Side of the square pictures that are sent to a served model; a picture has 196 tokens."""


def pocket_checkpoint(family: FamilyName) -> Path:
    """Returns the folder of the trained model in this package.

    Raises:
        ValueError: There is no model of the family.
    """
    if family not in get_args(PocketFamily):
        raise ValueError(f"there is no pocket model of {family}, only of {', '.join(get_args(PocketFamily))}")
    return Path(__file__).resolve().parent / "checkpoints" / family
