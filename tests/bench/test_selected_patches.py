from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmtok_bench.selected_patches import EncodedImage, OneGridFamily, PatchSelector
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy import Selection
from mmtok_deploy.photographs import photograph
from mmtok_deploy.selection import BudgetLike

QUESTION = "What is on the table?"


def select_patches(
    family: OneGridFamily, checkpoint: Path, image: Image.Image, question: str, budget: BudgetLike
) -> tuple[EncodedImage, Selection]:
    selector = PatchSelector(family, checkpoint)
    encoded = selector.encode(image)
    return encoded, selector.select(encoded, selector.embed(question), budget)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize(
    ("family", "size", "grid"), [("qwen2.5-vl", (600, 400), (14, 21)), ("llava-1.5", (600, 600), (24, 24))]
)
def test_the_grid_lies_on_what_the_encoder_saw(
    folder: Path, family: OneGridFamily, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    checkpoint = make_tiny_checkpoint(family, folder / family)
    encoded, selected = select_patches(family, checkpoint, photograph(), QUESTION, "10%")
    assert encoded.image.size == size
    assert encoded.grid == grid
    assert len(selected) == grid[0] * grid[1] // 10


@pytest.mark.parametrize(("size", "rows", "columns"), [((600, 400), (4, 20), (0, 24)), ((400, 600), (0, 24), (4, 20))])
def test_padding_is_never_picked(
    folder: Path, size: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    checkpoint = make_tiny_checkpoint("llava-1.5", folder / "llava-1.5")
    image = photograph().resize(size)
    # More than the photograph has: every token of it is picked, and nothing else.
    _, selected = select_patches("llava-1.5", checkpoint, image, QUESTION, 500)
    assert {divmod(index, 24) for index in selected.kept.tolist()} == {
        (row, column) for row in range(*rows) for column in range(*columns)
    }


def test_a_cropping_processor_leaves_no_padding(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint("llava-1.5", tmp_path / "it", pad_to_square=False)
    encoded, selected = select_patches("llava-1.5", checkpoint, photograph(), QUESTION, 576)
    assert encoded.image.size == (400, 400)
    assert len(selected) == 576


def test_the_question_guides(folder: Path) -> None:
    checkpoint = make_tiny_checkpoint("qwen2.5-vl", folder / "qwen2.5-vl")
    orders = [
        select_patches("qwen2.5-vl", checkpoint, photograph(), question, "10%")[1].order.tolist()
        for question in (QUESTION, QUESTION, "zzz")
    ]
    assert orders[0] == orders[1] != orders[2]


def test_keys_stand_in_raster_order(folder: Path) -> None:
    """A picture of one colour but for one patch: coverage of the image alone picks a patch near it early."""
    checkpoint = make_tiny_checkpoint("qwen2.5-vl", folder / "qwen2.5-vl")
    image = Image.new("RGB", (28 * 10, 28 * 10), "white")
    row, column = 7, 6
    image.paste(photograph("chelsea").resize((28, 28)), (28 * column, 28 * row))
    _, selected = select_patches("qwen2.5-vl", checkpoint, image, "", 3)
    assert (row, column) in {divmod(index, 10) for index in selected.order.tolist()}


def test_a_family_of_tiles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of qwen2\.5-vl, llava-1\.5, got 'llava-next'"):
        select_patches("llava-next", tmp_path, photograph(), QUESTION, "10%")  # type: ignore[arg-type]
