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

FAMILY: FamilyName = "qwen2-vl"
WIDE = (196, 112)


@pytest.mark.parametrize("image_size", [WIDE, (56, 56), (28, 140), (448, 336)])
def test_the_tower_is_hugging_faces(image_size: tuple[int, int]) -> None:
    encoder = build_encoder(checkpoint(FAMILY), image_size)
    pixels = pixels_of(FAMILY, image_size)
    assert tuple(pixels.shape) == encoder.pixels_shape
    expected = hugging_face(FAMILY, pixels, image_size, torch.float32)
    assert_equal(list(encoder(pixels)), expected, torch.float32)


def test_the_graph_is_hugging_faces() -> None:
    exported = export_encoder(checkpoint(FAMILY), WIDE, batch=DimRange.fixed(2))
    assert (exported.module.family, exported.module.grid) == (FAMILY, (1, 4, 7))
    assert exported.module.has_positions
    assert signature(exported) == {
        "pixels": ([2 * 28 * 4, 1176], "FLOAT"),
        "vision": ([2, 28, 256], "FLOAT"),
        "keys": ([2, 28, 64], "FLOAT"),
    }
    pixels = pixels_of(FAMILY, WIDE, 2)
    assert_equal(run(exported, pixels), hugging_face(FAMILY, pixels, WIDE, torch.float32), torch.float32)


@pytest.mark.slow
def test_one_graph_of_images_of_any_size_in_float16() -> None:
    session = session_of(export_encoder(checkpoint(FAMILY), DimRange(1, 60, 240), dtype=torch.float16))
    for image_size in (WIDE, (56, 56), (28, 140), (140, 448)):
        pixels = pixels_of(FAMILY, image_size)
        grid: Any = torch.tensor([[1, image_size[1] // 14, image_size[0] // 14]]).numpy()
        outputs = session.run(None, {"pixels": pixels.numpy(), "grid_thw": grid})
        assert [output.dtype.name for output in outputs] == ["float16", "float32"]
        assert_equal(outputs, hugging_face(FAMILY, pixels, image_size, torch.float16), torch.float16)
    with pytest.raises(Exception, match="Add"):
        session.run(None, {"pixels": pixels.numpy(), "grid_thw": torch.tensor([[1, 8, 20]]).numpy()})


def test_bfloat16() -> None:
    # ONNX Runtime's CPU provider multiplies no bfloat16 matrices.
    pixels = pixels_of(FAMILY, WIDE)
    outputs = list(build_encoder(checkpoint(FAMILY), WIDE, dtype=torch.bfloat16)(pixels))
    assert [output.dtype for output in outputs] == [torch.bfloat16, torch.float32]
    assert_equal(outputs, hugging_face(FAMILY, pixels, WIDE, torch.bfloat16), torch.bfloat16)


def test_an_image_size_that_is_no_multiple() -> None:
    with pytest.raises(EncoderError, match=r"multiples of 28 px, got 200x112.* 196x112$"):
        export_encoder(checkpoint(FAMILY), (200, 112))
