from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmtok_bench.picture import draw_kept

RED = (220, 30, 30)


def saturation(colour: tuple[int, ...]) -> int:
    return max(colour[:3]) - min(colour[:3])


def test_kept_patches_keep_their_colour_and_the_rest_loses_it(tmp_path: Path) -> None:
    rows, columns = 2, 3
    path = draw_kept(
        Image.new("RGB", (300, 200), RED), (rows, columns), [4, 0], tmp_path / "new" / "it.png", title="A wall"
    )
    assert path == tmp_path / "new" / "it.png"
    with Image.open(path) as page:
        assert page.format == "PNG"
        # The photograph is 1200 px wide and stands at the lower edge, within a margin.
        margin = (page.width - 1200) // 2
        top = page.height - margin - 800
        for index in range(rows * columns):
            row, column = divmod(index, columns)
            # Low in the patch: its number stands at the top.
            colour = page.convert("RGB").getpixel((margin + column * 400 + 200, top + row * 400 + 350))
            assert isinstance(colour, tuple)
            assert (saturation(colour) > 100) == (index in (0, 4)), index


@pytest.mark.parametrize("size", [(64, 640), (640, 64), (33, 35)])
def test_odd_sizes_and_no_kept_patch_are_drawn(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("L", size, 128)
    for order in ([], [0], list(range(15))):
        assert draw_kept(image, (3, 5), order, tmp_path / "it.png", title="", numbered=2).stat().st_size > 0


@pytest.mark.parametrize(("grid", "order", "message"), [((0, 3), [], "at least 1 row"), ((2, 2), [4], "from 0 to 3")])
def test_what_is_not_in_the_grid_is_refused(
    tmp_path: Path, grid: tuple[int, int], order: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_kept(Image.new("RGB", (8, 8)), grid, order, tmp_path / "it.png", title="")
