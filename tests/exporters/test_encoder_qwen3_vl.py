from __future__ import annotations

from typing import Any

import pytest
import torch

from mmtok_bench.families import FamilyName
from mmtok_deploy.dim_range import DimRange
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

FAMILY: FamilyName = "qwen3-vl"
WIDE = (224, 128)
ANY_SIZE = DimRange(1, 60, 400)


def grid_of(image_size: tuple[int, int]) -> Any:
    return torch.tensor([[1, image_size[1] // 16, image_size[0] // 16]]).numpy()


@pytest.mark.parametrize("image_size", [WIDE, (64, 64), (64, 320), (704, 544)])
def test_the_tower_is_hugging_faces(image_size: tuple[int, int]) -> None:
    """The position embeddings are interpolated up and down: the tiny tower has those of 16 x 16 patches."""
    encoder = build_encoder(checkpoint(FAMILY), image_size)
    pixels = pixels_of(FAMILY, image_size)
    assert tuple(pixels.shape) == encoder.pixels_shape
    expected = hugging_face(FAMILY, pixels, image_size, torch.float32)
    assert_equal(list(encoder(pixels)), expected, torch.float32)


@pytest.mark.parametrize(
    ("family", "batch_size"),
    [
        ("qwen3-vl", 2),
        ("qwen3.5", 2),
        # The encoders of mixtures of experts are those of the dense models.
        *(
            pytest.param(family, 1, marks=pytest.mark.exhaustive)
            for family in ("qwen3-vl", "qwen3-vl-moe", "qwen3.5-moe")
        ),
    ],
)
def test_the_graph_is_hugging_faces(family: FamilyName, batch_size: int) -> None:
    exported = export_encoder(checkpoint(family), WIDE, batch=DimRange.fixed(batch_size))
    assert (exported.module.family, exported.module.grid, exported.module.num_tokens) == (
        family,
        (1, 4, 7),
        DimRange.fixed(28),
    )
    assert exported.module.has_positions
    levels = {} if family.startswith("qwen3.5") else {"levels": ([batch_size, 28, 3 * 256], "FLOAT")}
    assert signature(exported) == {
        "pixels": ([batch_size * 28 * 4, 1536], "FLOAT"),
        "vision": ([batch_size, 28, 256], "FLOAT"),
        "keys": ([batch_size, 28, 64], "FLOAT"),
        **levels,
    }
    pixels = pixels_of(family, WIDE, batch_size)
    assert_equal(run(exported, pixels), hugging_face(family, pixels, WIDE, torch.float32), torch.float32)


@pytest.fixture(scope="module")
def any_size() -> Any:
    return session_of(export_encoder(checkpoint(FAMILY), ANY_SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [WIDE, (64, 64), (64, 320), (320, 64), (32, 128), (704, 544)])
def test_one_graph_of_images_of_any_size(any_size: Any, image_size: tuple[int, int]) -> None:
    """Wide, tall, a column, and grids smaller and larger than the 16 x 16 that have embeddings of their own."""
    pixels = pixels_of(FAMILY, image_size)
    outputs = any_size.run(["vision", "keys", "levels"], {"pixels": pixels.numpy(), "grid_thw": grid_of(image_size)})
    assert_equal(outputs, hugging_face(FAMILY, pixels, image_size, torch.float32), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [[1, 4, 6], [1, 8, 15], [1, 7, 16], [2, 8, 14], [1, 0, 14]])
def test_a_grid_that_is_not_the_pixels_is_refused(any_size: Any, grid: list[int]) -> None:
    pixels = pixels_of(FAMILY, WIDE)
    with pytest.raises(Exception, match="Add"):
        any_size.run(None, {"pixels": pixels.numpy(), "grid_thw": torch.tensor([grid]).numpy()})


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("qwen3-vl", torch.float16), ("qwen3.5-moe", torch.float32)])
def test_any_size_of_another_dtype_and_family(family: FamilyName, dtype: torch.dtype) -> None:
    session = session_of(export_encoder(checkpoint(family), ANY_SIZE, dtype=dtype))
    pixels = pixels_of(family, WIDE)
    outputs = session.run(None, {"pixels": pixels.numpy(), "grid_thw": grid_of(WIDE)})
    assert_equal(outputs, hugging_face(family, pixels, WIDE, dtype), dtype)


@pytest.mark.slow
def test_float16() -> None:
    exported = export_encoder(checkpoint(FAMILY), WIDE, dtype=torch.float16)
    pixels = pixels_of(FAMILY, WIDE)
    outputs = run(exported, pixels)
    assert [output.dtype.name for output in outputs] == ["float16", "float32", "float16"]
    assert_equal(outputs, hugging_face(FAMILY, pixels, WIDE, torch.float16), torch.float16)


def test_bfloat16() -> None:
    # ONNX Runtime's CPU provider multiplies no bfloat16 matrices.
    encoder = build_encoder(checkpoint(FAMILY), WIDE, dtype=torch.bfloat16)
    pixels = pixels_of(FAMILY, WIDE)
    outputs = list(encoder(pixels))
    assert [output.dtype for output in outputs] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert_equal(outputs, hugging_face(FAMILY, pixels, WIDE, torch.bfloat16), torch.bfloat16)


def test_an_image_size_that_is_no_multiple() -> None:
    with pytest.raises(EncoderError, match=r"multiples of 32 px, got 600x400.* 608x384$"):
        export_encoder(checkpoint(FAMILY), (600, 400))
