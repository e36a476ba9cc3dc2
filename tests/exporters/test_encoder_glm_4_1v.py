from __future__ import annotations

from typing import Any

import pytest
import torch

from mmtok_bench.families import FamilyName
from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders import build_encoder, export_encoder
from tests.exporters.encoder_cases import (
    assert_equal,
    checkpoint,
    hugging_face,
    pixels_of,
    run,
    session_of,
    signature,
)

FAMILY: FamilyName = "glm-4.1v"
WIDE = (224, 112)
ANY_SIZE = DimRange(1, 60, 400)


def grid_of(image_size: tuple[int, int]) -> Any:
    return torch.tensor([[1, image_size[1] // 14, image_size[0] // 14]]).numpy()


@pytest.mark.parametrize("image_size", [WIDE, (56, 56), (56, 280), (616, 476), (168, 168)])
def test_the_tower_is_hugging_faces(image_size: tuple[int, int]) -> None:
    """The position embeddings are interpolated up and down: the tiny tower has those of 12 x 12 patches."""
    encoder = build_encoder(checkpoint(FAMILY), image_size)
    pixels = pixels_of(FAMILY, image_size)
    assert tuple(pixels.shape) == encoder.pixels_shape
    assert_equal(list(encoder(pixels)), hugging_face(FAMILY, pixels, image_size, torch.float32), torch.float32)


@pytest.mark.parametrize(("family", "batch_size"), [("glm-4.1v", 2), ("glm-4.5v", 1)])
def test_the_graph_is_hugging_faces(family: FamilyName, batch_size: int) -> None:
    exported = export_encoder(checkpoint(family), WIDE, batch=DimRange.fixed(batch_size))
    assert (exported.module.family, exported.module.grid) == (family, (1, 4, 8))
    assert signature(exported) == {
        "pixels": ([batch_size * 32 * 4, 1176], "FLOAT"),
        "vision": ([batch_size, 32, 256], "FLOAT"),
        "keys": ([batch_size, 32, 64], "FLOAT"),
    }
    pixels = pixels_of(family, WIDE, batch_size)
    assert_equal(run(exported, pixels), hugging_face(family, pixels, WIDE, torch.float32), torch.float32)


@pytest.fixture(scope="module")
def any_size() -> Any:
    return session_of(export_encoder(checkpoint(FAMILY), ANY_SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [WIDE, (56, 56), (56, 280), (280, 56), (28, 112), (616, 476), (168, 168)])
def test_one_graph_of_images_of_any_size(any_size: Any, image_size: tuple[int, int]) -> None:
    """Wide, tall, a column, and grids smaller and larger than the 12 x 12 that have embeddings of their own."""
    pixels = pixels_of(FAMILY, image_size)
    outputs = any_size.run(["vision", "keys"], {"pixels": pixels.numpy(), "grid_thw": grid_of(image_size)})
    assert_equal(outputs, hugging_face(FAMILY, pixels, image_size, torch.float32), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [[1, 4, 16], [1, 8, 15], [1, 7, 16], [2, 8, 16], [1, 0, 16]])
def test_a_grid_that_is_not_the_pixels_is_refused(any_size: Any, grid: list[int]) -> None:
    pixels = pixels_of(FAMILY, WIDE)
    with pytest.raises(Exception, match="Add"):
        any_size.run(None, {"pixels": pixels.numpy(), "grid_thw": torch.tensor([grid]).numpy()})


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [WIDE, ANY_SIZE], ids=["one size", "any size"])
def test_float16(image_size: Any) -> None:
    session = session_of(export_encoder(checkpoint(FAMILY), image_size, dtype=torch.float16))
    pixels = pixels_of(FAMILY, WIDE)
    grid = {"grid_thw": grid_of(WIDE)} if image_size is ANY_SIZE else {}
    outputs = session.run(None, {"pixels": pixels.numpy(), **grid})
    assert [output.dtype.name for output in outputs] == ["float16", "float32"]
    assert_equal(outputs, hugging_face(FAMILY, pixels, WIDE, torch.float16), torch.float16)


def test_bfloat16() -> None:
    # ONNX Runtime's CPU provider multiplies no bfloat16 matrices.
    pixels = pixels_of(FAMILY, WIDE)
    outputs = list(build_encoder(checkpoint(FAMILY), WIDE, dtype=torch.bfloat16)(pixels))
    assert [output.dtype for output in outputs] == [torch.bfloat16, torch.float32]
    assert_equal(outputs, hugging_face(FAMILY, pixels, WIDE, torch.bfloat16), torch.bfloat16)
