from __future__ import annotations

import pytest

from mmtok_sglang.families.internvl3 import InternVL3
from mmtok_sglang.families.llava_1_5 import Llava15
from mmtok_sglang.families.qwen2_5_vl import Qwen25VL

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("prompt", "num_images"),
    [
        (f"{IMAGE}What is it?", 1),
        ("<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>", 1),
        (f"{IMAGE}{IMAGE} and <image>", 3),
        ("image_pad, <|im_start|>, <images>, vision_start", 0),
    ],
)
def test_a_placeholder_for_each_image_passes(prompt: str, num_images: int) -> None:
    Qwen25VL.placeholder_rule.check(prompt, num_images)


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [
        (
            f"{IMAGE}{IMAGE}",
            1,
            r"2 image placeholders \(such as <\|vision_start\|>.*\) for 1 image: write one for each",
        ),
        (IMAGE, 2, r"1 image placeholder \(such as .*\) for 2 images: write one for each image, and none in the text"),
        ("no image", 1, "^the prompt has 0 image placeholders for 1 image: write one for each image"),
        (f"{IMAGE}see <image>", 1, "2 image placeholders"),
        (f"{IMAGE}what is <|image_pad|> ?", 1, r"has <\|image_pad\|>, which the model reads as a part of an image"),
        (f"{IMAGE}<|vision_start|>", 1, r"has <\|vision_start\|>, which"),
        (f"{IMAGE}<|video_pad|><|vision_end|>", 1, r"has <\|video_pad\|> and <\|vision_end\|>, which"),
        ("<|vision_start|><|image_pad|> <|vision_end|>", 1, "0 image placeholders for 1 image"),
    ],
)
def test_any_other_placeholder_is_refused(prompt: str, num_images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen25VL.placeholder_rule.check(prompt, num_images)


def test_videos_have_placeholders_of_their_own() -> None:
    check = Qwen25VL.placeholder_rule.check
    check(f"{IMAGE}{VIDEO}", 1, 1)
    for prompt, num_videos in ((f"{IMAGE}{VIDEO}", 0), (IMAGE, 1), (f"{IMAGE}{VIDEO}{VIDEO}", 1)):
        with pytest.raises(ValueError, match="write one for each video, and none in the text"):
            check(prompt, 1, num_videos)
    with pytest.raises(ValueError, match=r"has <\|video_pad\|>, which"):
        check(f"{IMAGE}{VIDEO}<|video_pad|>", 1, 1)
    # Where videos are not pruned, what stands for one is SGLang's affair.
    InternVL3.placeholder_rule.check("<image> <video>", 1, 1)


def test_llava_reserves_nothing_but_its_placeholder() -> None:
    Llava15.placeholder_rule.check("USER: <image>\nwhat is <|image_pad|> ? ASSISTANT:", 1)
    with pytest.raises(ValueError, match=r"2 image placeholders \(such as <image>\) for 1 image"):
        Llava15.placeholder_rule.check("USER: <image>\nwhat is <image> ? ASSISTANT:", 1)
