from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from mmtok_bench.families import FamilyName
from mmtok_deploy import select_tokens
from mmtok_deploy.cli import main
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines import open_engine
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.photographs import photograph
from mmtok_deploy.presets import PRESETS
from mmtok_export.encoders import EncoderError, describe_encoder
from tests.exporters.encoder_cases import checkpoint, hugging_face

FAMILY: FamilyName = "llava-next"
SIDE, TILE = 24, 336


def tiles_of(size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Returns the tiles of a photograph of that size, and rows and columns of its crops."""
    processor = AutoImageProcessor.from_pretrained(checkpoint(FAMILY))
    inputs = processor(images=[photograph("coffee").resize(size)], return_tensors="pt")
    pinpoints = json.loads((checkpoint(FAMILY) / "config.json").read_text())["image_grid_pinpoints"]
    rows, columns = get_anyres_image_grid_shape(inputs["image_sizes"][0], pinpoints, TILE)
    return inputs["pixel_values"][0][: 1 + rows * columns], (rows, columns)


def joined(vision: Tensor, kept: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Returns the base tile's kept tokens and those of the picture that the crops are put together to."""
    rows, columns = grid
    picture = torch.zeros(rows * SIDE, columns * SIDE, vision.shape[2])
    is_kept = torch.zeros(rows * SIDE, columns * SIDE, dtype=torch.bool)
    for crop, (tokens, indices) in enumerate(zip(vision[1:], kept[1:], strict=True)):
        row, column = divmod(crop, columns)
        place = slice(row * SIDE, (row + 1) * SIDE), slice(column * SIDE, (column + 1) * SIDE)
        picture[place] = tokens.view(SIDE, SIDE, -1)
        is_kept[place] = torch.isin(torch.arange(SIDE * SIDE), indices).view(SIDE, SIDE)
    return torch.cat([vision[0][kept[0]], picture[is_kept]])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "a.onnx"
    arguments = ["--budget=160", "--dtype=float32", "--text-tokens=1:4:8", "--budget-input", f"--output={path}"]
    assert main(["export", "encoder", f"--model={checkpoint(FAMILY)}", *arguments]) == 0
    return path


def inputs_of(tiles: Tensor, grid: tuple[int, int], budgets: list[int]) -> dict[str, Tensor]:
    text = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(3)).repeat(len(tiles), 1, 1)
    return {
        "pixels": tiles,
        "text": text,
        "text_mask": torch.ones(len(tiles), 5, dtype=torch.bool),
        "excluded": torch.zeros(len(tiles), SIDE * SIDE, dtype=torch.bool),
        "budget": torch.tensor(budgets),
        "tile_grid": torch.tensor(grid),
    }


def test_as_many_tokens_of_each_tile_as_a_server_keeps(file: Path) -> None:
    manifest = Manifest.load(file)
    # 160 is what an image of the most tiles keeps in all.
    assert (manifest.budget, manifest.dimensions["B"]) == (32, DimRange(3, 5, 5))
    assert manifest.check.status == "passed", manifest.check.detail


@pytest.mark.parametrize(("size", "grid"), [((600, 600), (2, 2)), ((900, 300), (1, 3)), ((300, 640), (2, 1))])
def test_one_file_of_every_grid_of_tiles(file: Path, size: tuple[int, int], grid: tuple[int, int]) -> None:
    tiles, found = tiles_of(size)
    assert found == grid
    inputs = inputs_of(tiles, grid, [32] * len(tiles))
    outputs = open_engine(file, torch.device("cpu")).run(inputs)
    vision, keys = hugging_face(FAMILY, tiles, size, torch.float32)
    config = PRESETS[FAMILY].config
    kept = [
        select_tokens(rows, key, text, 32, config=config).kept
        for rows, key, text in zip(vision, keys, inputs["text"], strict=True)
    ]
    assert torch.equal(outputs["kept"], torch.stack(kept))
    expected = joined(vision, kept, grid)
    torch.testing.assert_close(outputs["joined_tokens"].flatten(0, 1), expected, rtol=0, atol=1e-4)


def test_each_tile_has_its_own_budget(file: Path) -> None:
    tiles, grid = tiles_of((900, 300))
    outputs = open_engine(file, torch.device("cpu")).run(inputs_of(tiles, grid, [5, 9, 3, 1]))
    kept = [row[row >= 0] for row in outputs["kept"]]
    assert [len(row) for row in kept] == [5, 9, 3, 1]
    vision, _ = hugging_face(FAMILY, tiles, (900, 300), torch.float32)
    found = outputs["joined_tokens"].flatten(0, 1)
    torch.testing.assert_close(found[:18], joined(vision, kept, grid), rtol=0, atol=1e-4)
    assert not found[18:].any()


def test_a_grid_of_other_tiles_gives_no_tokens(file: Path) -> None:
    tiles, _ = tiles_of((900, 300))
    outputs = open_engine(file, torch.device("cpu")).run(inputs_of(tiles, (2, 2), [4] * 4))
    assert outputs["joined_tokens"].isnan().all()


def test_no_image_has_as_many_tiles() -> None:
    for batch in (DimRange.fixed(1), DimRange(3, 4, 6)):
        with pytest.raises(EncoderError, match=f"has 3 to 5 tiles, got {batch} as --batch-size"):
            describe_encoder(checkpoint(FAMILY), (TILE, TILE), batch)
