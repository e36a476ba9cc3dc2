"""A sheet of scenes, each with a question and its answer underneath."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmtok_bench.pocket.scenes import SCENE_PX, draw, make_scene
from pocket_training.questions import KINDS, ask

__all__ = ["draw_sheet"]

_COLUMNS, _ROWS = 4, 2
_SCALE = 3
_MARGIN_PX = 12
_TEXT_PX = 26


def draw_sheet(path: Path, *, seed: int) -> Path:
    """Returns `path`, where eight scenes drawn from `seed` then stand as a PNG."""
    cell_width, cell_height = SCENE_PX * _SCALE + _MARGIN_PX, SCENE_PX * _SCALE + _MARGIN_PX + _TEXT_PX
    sheet = Image.new("RGB", (_COLUMNS * cell_width + _MARGIN_PX, _ROWS * cell_height + _MARGIN_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number in range(_COLUMNS * _ROWS):
        rng = np.random.default_rng([seed, number])
        scene = make_scene(rng)
        left = _MARGIN_PX + number % _COLUMNS * cell_width
        top = _MARGIN_PX + number // _COLUMNS * cell_height
        sheet.paste(draw(scene, _SCALE), (left, top))
        if question := ask(rng, scene, KINDS[number % len(KINDS)]):
            pen.text(
                (left, top + SCENE_PX * _SCALE + 4), f"{question.text}  {question.answer}", fill="black", font=font
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
