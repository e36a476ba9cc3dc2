from __future__ import annotations

import math

import pytest

from mmtok_bench.dummy_models import make_processor
from mmtok_bench.serve.image_tokens import count_image_tokens, downsampled_px
from mmtok_bench.serve.presets import Size


@pytest.fixture(scope="module")
def qwen() -> object:
    return make_processor("qwen2.5-vl-7b")


@pytest.mark.parametrize(
    ("size_px", "wanted"), [((1008, 672), 86), ((1008, 672), 43), ((1008, 784), 100), ((448, 448), 25)]
)
def test_a_smaller_image_for_qwen_has_about_the_tokens_wanted_in_about_its_shape(
    qwen: object, size_px: Size, wanted: int
) -> None:
    smaller = downsampled_px(qwen, "qwen2.5-vl", size_px, wanted)
    assert smaller is not None
    assert count_image_tokens(qwen, smaller) == pytest.approx(wanted, rel=0.05)
    stretch = smaller[0] / smaller[1] / (size_px[0] / size_px[1])
    assert abs(math.log(stretch)) <= math.log(1.25)


def test_an_image_that_is_small_enough_is_not_sent_smaller(qwen: object) -> None:
    assert downsampled_px(qwen, "qwen2.5-vl", (28, 28), 1) is None


def test_qwen3_vl_enlarges_an_image_of_fewer_than_64_tokens() -> None:
    processor = make_processor("qwen3-vl-8b")
    smaller = downsampled_px(processor, "qwen3-vl", (1024, 768), 76)
    assert smaller is not None
    assert count_image_tokens(processor, smaller) == pytest.approx(76, rel=0.05)
    assert count_image_tokens(processor, (256, 128)) == 72
    assert downsampled_px(processor, "qwen3-vl", (1024, 768), 38) is None


def test_llava_next_reads_two_tiles_at_least() -> None:
    processor = make_processor("llava-next-7b")
    smaller = downsampled_px(processor, "llava-next", (672, 672), 160)
    assert smaller == (336, 336)
    # Two tiles and the newline tokens of one.
    assert count_image_tokens(processor, smaller) == 2 * 576 + 24


def test_llava_1_5_reads_every_image_as_the_same_square() -> None:
    processor = make_processor("llava-1.5-7b")
    assert downsampled_px(processor, "llava-1.5", (672, 672), 64) == (672, 672)
    assert count_image_tokens(processor, (100, 100)) == count_image_tokens(processor, (672, 672))
