"""Scenes: the same from the same seed, nothing overlaps, and the mask says what the picture shows."""

from itertools import combinations

import numpy as np
import pytest

from mmtok_bench.pocket.scenes import COLOR_RGB, SCENE_PX, Scene, draw, make_scene
from pocket_training.training_data import draw_mask

SEEDS = range(40)


def scene_of(seed: int) -> Scene:
    return make_scene(np.random.default_rng(seed))


def test_a_seed_gives_one_scene_and_one_picture() -> None:
    assert scene_of(3) == scene_of(3)
    assert scene_of(3) != scene_of(4)
    assert np.array_equal(np.asarray(draw(scene_of(3))), np.asarray(draw(scene_of(3))))


@pytest.mark.parametrize("seed", SEEDS)
def test_things_are_apart_inside_and_off_the_middle_lines(seed: int) -> None:
    scene = scene_of(seed)
    boxes = [(thing.x, thing.y, thing.size_px / 2) for thing in scene.things]
    boxes += [(glyph.x, glyph.y, 7.5) for glyph in scene.glyphs]
    assert 2 <= len(scene.things) + len(scene.glyphs) <= 8
    for x, y, half in boxes:
        assert min(x, y) - half > 0
        assert max(x, y) + half < SCENE_PX
        assert min(abs(x - SCENE_PX / 2), abs(y - SCENE_PX / 2)) >= 5
    for (x, y, half), (other_x, other_y, other_half) in combinations(boxes, 2):
        assert max(abs(x - other_x), abs(y - other_y)) >= half + other_half + 3


@pytest.mark.parametrize("seed", SEEDS)
def test_where_the_mask_shows_a_thing_the_picture_has_its_colour(seed: int) -> None:
    scene = scene_of(seed)
    pixels = np.asarray(draw(scene, 1)).astype(int)
    mask = draw_mask(scene)
    for number, thing in enumerate(scene.things, start=1):
        assert (mask == number).sum() > 30
        middle = np.median(pixels[mask == number], axis=0)
        assert np.abs(middle - COLOR_RGB[thing.color]).max() <= 18


def test_scales_show_the_same_scene() -> None:
    large, small = (draw(scene_of(5), scale).resize((28, 28)) for scale in (4, 2))
    assert np.abs(np.asarray(large).astype(int) - np.asarray(small)).mean() < 12
