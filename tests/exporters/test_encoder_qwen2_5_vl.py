from __future__ import annotations

from typing import Any

import pytest
import torch

from mmtok_bench.families import FamilyName
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.presets import PRESETS
from mmtok_export.encoders import EncoderError, build_encoder, export_encoder
from tests.exporters.encoder_cases import (
    assert_equal,
    checkpoint,
    hugging_face,
    pixels_of,
    run,
    session_of,
    signature,
)

FAMILY: FamilyName = "qwen2.5-vl"
FULL_WINDOWS = (448, 336)
CUT_WINDOWS = (392, 252)


@pytest.mark.parametrize(
    "image_size",
    [
        FULL_WINDOWS,
        CUT_WINDOWS,
        (112, 112),  # one window, full
        (84, 56),  # one window, and the image smaller than it
        (28, 140),  # a column; the last window holds one token
        (140, 448),  # cut on the right alone
        (448, 140),  # cut at the bottom alone
    ],
)
def test_the_tower_is_hugging_faces(image_size: tuple[int, int]) -> None:
    encoder = build_encoder(checkpoint(FAMILY), image_size)
    pixels = pixels_of(FAMILY, image_size)
    assert tuple(pixels.shape) == encoder.pixels_shape
    expected = hugging_face(FAMILY, pixels, image_size, torch.float32)
    assert_equal(list(encoder(pixels)), expected, torch.float32)


@pytest.mark.parametrize(
    ("image_size", "batch_size"),
    [
        (CUT_WINDOWS, 2),
        *(pytest.param(size, 1, marks=pytest.mark.exhaustive) for size in (FULL_WINDOWS, CUT_WINDOWS)),
    ],
)
def test_the_graph_is_hugging_faces(image_size: tuple[int, int], batch_size: int) -> None:
    exported = export_encoder(checkpoint(FAMILY), image_size, batch=DimRange.fixed(batch_size))
    columns, rows = image_size[0] // 28, image_size[1] // 28
    num_tokens = rows * columns
    assert (exported.module.family, exported.module.grid, exported.module.num_tokens) == (
        FAMILY,
        (1, rows, columns),
        DimRange.fixed(num_tokens),
    )
    assert exported.module.family in PRESETS
    assert exported.module.has_positions
    assert signature(exported) == {
        "pixels": ([batch_size * num_tokens * 4, 1176], "FLOAT"),
        "vision": ([batch_size, num_tokens, 256], "FLOAT"),
        "keys": ([batch_size, num_tokens, 64], "FLOAT"),
    }
    pixels = pixels_of(FAMILY, image_size, batch_size)
    expected = hugging_face(FAMILY, pixels, image_size, torch.float32)
    assert_equal(run(exported, pixels), expected, torch.float32)


ANY_SIZE = DimRange(1, 60, 240)


@pytest.fixture(scope="module")
def any_size() -> Any:
    return session_of(export_encoder(checkpoint(FAMILY), ANY_SIZE))


@pytest.mark.slow
@pytest.mark.parametrize(
    "image_size",
    [(448, 336), (392, 252), (56, 56), (112, 112), (28, 140), (140, 448), (448, 140), (364, 84)],
)
def test_one_graph_of_images_of_any_size(any_size: Any, image_size: tuple[int, int]) -> None:
    """Full windows, and windows cut on the right, at the bottom, at both edges and to one token."""
    pixels = pixels_of(FAMILY, image_size)
    grid = torch.tensor([[1, image_size[1] // 14, image_size[0] // 14]])
    outputs = any_size.run(["vision", "keys"], {"pixels": pixels.numpy(), "grid_thw": grid.numpy()})
    assert_equal(outputs, hugging_face(FAMILY, pixels, image_size, torch.float32), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [[1, 4, 6], [1, 10, 16], [1, 8, 17], [2, 8, 16], [0, 8, 16], [1, 0, 16]])
def test_a_grid_that_is_not_the_pixels_is_refused(any_size: Any, grid: list[int]) -> None:
    pixels = pixels_of(FAMILY, (224, 112))
    with pytest.raises(Exception, match="Add"):
        any_size.run(None, {"pixels": pixels.numpy(), "grid_thw": torch.tensor([grid]).numpy()})


@pytest.mark.exhaustive
def test_any_size_in_half_precision() -> None:
    exported = export_encoder(checkpoint(FAMILY), ANY_SIZE, dtype=torch.float16)
    pixels = pixels_of(FAMILY, CUT_WINDOWS)
    grid = torch.tensor([[1, CUT_WINDOWS[1] // 14, CUT_WINDOWS[0] // 14]])
    outputs = session_of(exported).run(None, {"pixels": pixels.numpy(), "grid_thw": grid.numpy()})
    assert [output.dtype.name for output in outputs] == ["float16", "float32"]
    assert_equal(outputs, hugging_face(FAMILY, pixels, CUT_WINDOWS, torch.float16), torch.float16)


@pytest.mark.parametrize(
    ("family", "batch", "message"),
    [
        ("qwen2.5-vl", DimRange.fixed(2), "takes one at a time, got 2: leave --batch-size out"),
        ("qwen3-vl", DimRange.fixed(2), "takes one at a time, got 2: leave --batch-size out"),
        ("llava-1.5", None, "can be made of qwen2-vl, qwen2.5-vl, .*internvl3, got llava-1.5: name --image-size"),
    ],
)
def test_any_size_is_refused(family: FamilyName, batch: DimRange | None, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        export_encoder(checkpoint(family), ANY_SIZE, batch=batch)


@pytest.mark.exhaustive
def test_float16() -> None:
    exported = export_encoder(checkpoint(FAMILY), CUT_WINDOWS, dtype=torch.float16)
    pixels = pixels_of(FAMILY, CUT_WINDOWS)
    outputs = run(exported, pixels)
    assert [output.dtype.name for output in outputs] == ["float16", "float32"]
    assert_equal(outputs, hugging_face(FAMILY, pixels, CUT_WINDOWS, torch.float16), torch.float16)


def test_bfloat16() -> None:
    # ONNX Runtime's CPU provider multiplies no bfloat16 matrices.
    encoder = build_encoder(checkpoint(FAMILY), CUT_WINDOWS, dtype=torch.bfloat16)
    pixels = pixels_of(FAMILY, CUT_WINDOWS)
    outputs = list(encoder(pixels))
    assert [output.dtype for output in outputs] == [torch.bfloat16, torch.float32]
    assert_equal(outputs, hugging_face(FAMILY, pixels, CUT_WINDOWS, torch.bfloat16), torch.bfloat16)


def test_a_last_block_beyond_float16_leaves_finite_features() -> None:
    pixels = pixels_of(FAMILY, CUT_WINDOWS)
    outputs = {}
    for dtype in (torch.float32, torch.float16):
        encoder = build_encoder(checkpoint(FAMILY), CUT_WINDOWS, dtype=dtype)
        encoder.get_parameter("visual.blocks.1.mlp.down_proj.bias")[7] += 1e6
        outputs[dtype] = encoder(pixels)
    expected_vision, expected_keys = outputs[torch.float32]
    vision, keys = outputs[torch.float16]
    assert expected_keys.abs().max() > torch.finfo(torch.float16).max
    assert (vision.float() - expected_vision).abs().max() < 3e-2
    assert torch.allclose(keys, expected_keys, rtol=1e-3, atol=3e-2)


@pytest.mark.parametrize(
    ("image_size", "nearest"), [((600, 400), "588x392"), ((448, 337), "448x336"), ((1, 0), "28x28")]
)
def test_an_image_size_that_is_no_multiple(image_size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(EncoderError, match=f"multiples of 28 px, got {image_size[0]}x{image_size[1]}.* {nearest}$"):
        export_encoder(checkpoint(FAMILY), image_size)
