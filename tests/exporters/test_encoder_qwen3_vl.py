from __future__ import annotations

import pytest
import torch

from mmtok_bench.families import FamilyName
from mmtok_deploy.dim_range import DimRange
from mmtok_export.encoders import EncoderError, build_encoder, export_encoder
from tests.exporters.encoder_cases import assert_equal, checkpoint, hugging_face, pixels_of, run, signature

FAMILY: FamilyName = "qwen3-vl"
WIDE = (224, 128)


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
