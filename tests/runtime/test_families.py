from __future__ import annotations

import asyncio
import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch
from PIL import Image
from sglang.srt.configs import qwen3_5 as sglang_configs
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.utils import ImageData
from transformers import CLIPImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mmtok_deploy import Budget
from mmtok_deploy.budget import tokens_per_tile
from mmtok_deploy.methods import MethodName
from mmtok_deploy.padding import padding_mask
from mmtok_deploy.photographs import photograph
from mmtok_deploy.repeated_tokens import Box
from mmtok_sglang.families import internvl3
from mmtok_sglang.families.base import Family
from mmtok_sglang.families.internvl3 import InternVL3
from mmtok_sglang.families.llava_1_5 import Llava15
from mmtok_sglang.families.llava_next import LlavaNext, _raster_order
from mmtok_sglang.families.qwen import _parts
from mmtok_sglang.families.qwen2_5_vl import Qwen25VL, by_frame
from mmtok_sglang.families.qwen3_5 import Qwen35, Qwen35Moe
from mmtok_sglang.families.qwen3_vl import Qwen3VL, Qwen3VLProcessor
from mmtok_sglang.feature_cache import Features
from mmtok_sglang.limits import Limits
from mmtok_sglang.model import EncodedImage, PrunedModel
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.request import Requested
from mmtok_sglang.transformers_backend import separate_images
from tests.runtime.stand_ins import identified, image_item, make_settings


def llava_output(num_images: int, spans: list[tuple[int, int]], **data: Any) -> Any:
    bundle = image_item((0, 0), model_specific_data=data)
    bundle.offsets = spans
    bundle.feature = torch.arange(num_images, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 336, 336)
    return SimpleNamespace(mm_items=[bundle])


def test_images_are_separated_where_their_placeholders_touch() -> None:
    output = llava_output(3, [(1, 5), (7, 8)], image_sizes=torch.tensor([[10, 11], [20, 21], [30, 31]]))
    separate_images(output, [3, 2, 2])
    assert [item.offsets for item in output.mm_items] == [[(1, 3)], [(4, 5)], [(7, 8)]]
    assert [item.feature[:, 0, 0, 0].tolist() for item in output.mm_items] == [[0], [1], [2]]
    assert [item.image_sizes.tolist() for item in output.mm_items] == [[[10, 11]], [[20, 21]], [[30, 31]]]


@pytest.mark.parametrize(
    ("spans", "counts", "message"),
    [
        ([(1, 5)], [3, 3], "the prompt has 5 image placeholders, its 2 images have 6"),
        ([(1, 5)], [3], "the prompt has 5 image placeholders, its 1 images have 3"),
        ([], [3], "the prompt has 0 image placeholders, its 1 images have 3"),
        ([(1, 2), (4, 6)], [3, 2], "the placeholders of image 0 are not in one piece"),
    ],
)
def test_placeholders_that_are_not_the_images_are_refused(
    spans: list[tuple[int, int]], counts: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        separate_images(llava_output(len(counts), spans), counts)


def counting_processor(count: int) -> Any:
    def count_tokens(image_sizes: list[tuple[int, int]]) -> dict[str, list[int]]:
        return {"num_image_tokens": [count] * len(image_sizes)}

    return SimpleNamespace(_processor=SimpleNamespace(_get_num_multimodal_tokens=count_tokens))


def test_llava_excludes_the_padding_of_each_image() -> None:
    output = llava_output(2, [(0, 575), (580, 1155)], image_sizes=torch.tensor([[400, 600], [300, 300]]))
    family = Llava15()
    family.separate_images(output, counting_processor(576))
    padded, square = output.mm_items
    mask = family.excluded(padded)
    assert mask is not None
    assert torch.equal(mask, padding_mask(400, 600, 336, 24))
    assert family.excluded(square) is None
    # The encoder would be called with them.
    assert "image_sizes" not in padded.model_specific_data


def test_llava_without_square_padding_excludes_nothing() -> None:
    output = llava_output(1, [(0, 575)])
    Llava15().separate_images(output, counting_processor(576))
    assert Llava15().excluded(output.mm_items[0]) is None


@pytest.mark.parametrize(
    ("crops", "pads", "box"),
    [
        (True, False, (0.25, 0.0, 0.75, 1.0)),
        (True, True, (0.0, 0.0, 1.0, 1.0)),
        (False, False, (0.0, 0.0, 1.0, 1.0)),
    ],
)
def test_llava_sees_the_square_that_its_processor_crops(crops: bool, pads: bool, box: Box) -> None:
    images = CLIPImageProcessor(do_center_crop=crops)
    images.do_pad = pads
    processor = SimpleNamespace(_processor=SimpleNamespace(image_processor=images))
    assert Llava15().box_seen(processor, 400, 200) == box
    if not pads and crops:
        # What the processor makes of the picture is what it makes of the box.
        picture = photograph("rocket").resize((400, 200))
        left, top, right, bottom = box
        part = picture.crop((round(left * 400), round(top * 200), round(right * 400), round(bottom * 200)))
        whole, cropped = (images(each, return_tensors="pt")["pixel_values"] for each in (picture, part))
        assert (whole - cropped).abs().mean() < 0.01


@pytest.mark.parametrize("family", [Llava15(), LlavaNext()])
def test_llava_takes_no_token_ids(family: Llava15 | LlavaNext) -> None:
    call = family.process(cast(Any, None), None, [], input_text=[1, 2])
    with pytest.raises(ValueError, match="this model takes a prompt with images as text"):
        asyncio.run(call)


def test_llava_with_a_mixture_of_experts_or_another_encoder_is_refused() -> None:
    text, clip = SimpleNamespace(), SimpleNamespace(model_type="clip_vision_model")
    config = SimpleNamespace(text_config=text, vision_config=clip)
    assert Llava15().obstacle(config) is None
    clip.model_type = "pixtral"
    assert "its vision encoder is pixtral, not one of clip" in str(Llava15().obstacle(config))
    text.num_local_experts = 8
    assert Llava15().obstacle(config) == "its language model is a mixture of experts"


@pytest.mark.parametrize("spans", [[], [(0, 575)], [(0, 287), (290, 577)]])
def test_llava_refuses_fewer_placeholders_than_images(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="its 2 images have 1152"):
        Llava15().separate_images(llava_output(2, spans), counting_processor(576))


@pytest.mark.parametrize(
    ("budget", "num_tiles", "max_tiles", "kept"),
    [
        (Budget(tokens=160), 5, 5, 32),
        (Budget(tokens=160), 3, 5, 32),
        (Budget(tokens=160), 3, 3, 53),
        (Budget(tokens=4), 5, 5, 1),
        (Budget(tokens=10**6), 5, 5, 576),
        (Budget.parse("10%"), 5, 5, 57),
        (Budget.parse("10%"), 3, 5, 57),
        (Budget.parse("0.01%"), 3, 5, 1),
        (Budget.parse("all"), 3, 5, 576),
        (Budget.parse("100%"), 3, 5, 576),
        (Budget(tokens=4, minimum=64), 5, 5, 13),
        (Budget(tokens=4, minimum=64), 3, 5, 22),
        (Budget.parse("1%", minimum=64), 3, 5, 22),
        (Budget(tokens=4, minimum=10**6), 3, 5, 576),
    ],
)
def test_tokens_of_each_tile(budget: Budget, num_tiles: int, max_tiles: int, kept: int) -> None:
    assert tokens_per_tile(budget, 576, num_tiles, max_tiles) == kept


LLAVA_NEXT = SimpleNamespace(
    vision_config=SimpleNamespace(image_size=336, patch_size=14),
    image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
)


@pytest.mark.parametrize(
    ("size", "budget", "num_tokens", "kept"),
    [
        ([600, 600], 160, 2928, 160),
        ([336, 672], 160, 1176, 96),
        ([336, 672], "all", 1176, 1176),
        ([336, 672], "99.99%", 1176, 1176),
        ([20, 900], 2800, 600, 600),
    ],
)
def test_what_an_image_of_tiles_keeps(size: list[int], budget: int | str, num_tokens: int, kept: int) -> None:
    item = image_item((0, num_tokens - 1), model_specific_data={"image_sizes": torch.tensor([size])})
    assert LlavaNext().num_kept(item, num_tokens, Budget.parse(budget), LLAVA_NEXT) == kept


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("num_kept", [1, 4, 9])
def test_kept_tokens_of_crops_come_in_raster_order_of_the_joined_grid(grid: tuple[int, int], num_kept: int) -> None:
    side, num_crops = 3, grid[0] * grid[1]
    generator = torch.Generator().manual_seed(num_kept)
    kept = torch.stack([torch.randperm(side * side, generator=generator)[:num_kept] for _ in range(num_crops)])
    # The picture of the joined grid, once as flat indices tile by tile and once as what is kept.
    index = torch.arange(num_crops * side * side)
    is_kept = torch.zeros(num_crops, side * side, dtype=torch.bool).scatter(1, kept, True)
    picture, mask = (
        tokens.reshape(*grid, side, side).transpose(1, 2).reshape(grid[0] * side, grid[1] * side)
        for tokens in (index, is_kept)
    )
    flat = kept + side**2 * (1 + torch.arange(num_crops)[:, None])
    assert torch.equal(_raster_order(flat.flatten(), grid, side), side**2 + picture[mask])
    # Before them the base tile's, however the tokens come.
    mixed = torch.cat([flat.flatten(), torch.tensor([2, 7])])
    expected = torch.cat([torch.tensor([2, 7]), side**2 + picture[mask]])
    assert torch.equal(_raster_order(mixed[torch.randperm(len(mixed), generator=generator)], grid, side), expected)


@pytest.mark.parametrize(
    ("size", "num_tiles", "budget", "num_tokens", "kept"),
    [
        ([600, 600], 5, 160, 2928, 160),
        ([336, 672], 3, 160, 1176, 160),
        ([600, 600], 5, "10%", 2928, 288),
        ([336, 672], 3, "10%", 1176, 172),
        ([336, 672], 3, "all", 1176, 1176),
        ([336, 672], 3, "99.99%", 1176, 1176),
        ([20, 900], 4, 2800, 600, 600),
    ],
)
def test_what_an_image_whose_tiles_share_its_budget_keeps(
    size: list[int], num_tiles: int, budget: int | str, num_tokens: int, kept: int
) -> None:
    family = LlavaNext().configured(replace(make_settings(family="llava-next"), share_tiles=True))
    item = image_item((0, num_tokens - 1), model_specific_data={"image_sizes": torch.tensor([size])})
    assert family.num_kept(item, num_tokens, Budget.parse(budget), LLAVA_NEXT) == kept
    assert family.selection_size(item, num_tokens, kept, LLAVA_NEXT) == (num_tiles * 576, kept)
    assert family.num_selected_from(LLAVA_NEXT) is None
    assert family.max_num_kept(2880, Budget(tokens=160), LLAVA_NEXT) == 160


QWEN = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))


def qwen_item(grids: list[list[int]]) -> Any:
    return image_item((0, 0), model_specific_data={"image_grid_thw": torch.tensor(grids)})


@pytest.mark.parametrize(("budget", "kept"), [("10%", 29), (64, 64), (1000, 294)])
def test_what_a_qwen_image_keeps(budget: str | int, kept: int) -> None:
    assert Qwen25VL().num_kept(qwen_item([[1, 28, 42]]), 294, Budget.parse(budget), QWEN) == kept


@pytest.mark.parametrize("grids", [[[1, 28, 42], [1, 4, 4]], [[1, 4, 4]]])
def test_placeholders_of_another_number_than_a_qwen_image_has_are_refused(grids: list[list[int]]) -> None:
    # Two images and one placeholder in the prompt: the selection would point outside of the positions.
    with pytest.raises(ValueError, match=r"the prompt has 294 placeholders for \d+ tokens of an image"):
        Qwen25VL().num_kept(qwen_item(grids), 294, Budget(tokens=64), QWEN)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "partition", "is_refused"),
    [(36, 1, None, False), (36, 8, None, False), (6, 2, None, False), (6, 3, None, True), (36, 2, "2,34", True)],
)
def test_a_pipeline_whose_first_stage_has_not_the_layers_of_deepstack_is_refused(
    num_layers: int, num_stages: int, partition: str | None, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGLANG_PP_LAYER_PARTITION", raising=False)
    if partition is not None:
        monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", partition)
    config = SimpleNamespace(
        text_config=SimpleNamespace(num_hidden_layers=num_layers),
        vision_config=SimpleNamespace(deepstack_visual_indexes=[8, 16, 24]),
    )
    obstacle = Qwen3VL().obstacle_to_stages(num_stages, config)
    assert (obstacle is not None) is is_refused
    assert Qwen25VL().obstacle_to_stages(num_stages, config) is None


@pytest.mark.parametrize("family", [Qwen35, Qwen35Moe])
def test_a_qwen3_5_with_deepstack_is_refused(family: type[Family]) -> None:
    """It has none; SGLang's default, where a configuration does not say so, is Qwen3-VL's three levels."""
    theirs = SimpleNamespace(vision_config=SimpleNamespace(deepstack_visual_indexes=[]))
    assert family().obstacle(theirs) is None
    assert family().obstacle_to_stages(8, theirs) is None
    silent = sglang_configs.Qwen3_5Config(vision_config={})
    assert "3 levels of DeepStack" in str(family().obstacle(silent))


def test_a_token_is_selected_by_what_the_language_model_reads_of_it() -> None:
    """And kept with all that DeepStack adds at its place."""
    plan = ImagePlan(5, 2, [1])
    item = identified(image_item((0, 1), plan))
    vision, keys = torch.randn(1, 5, 32), torch.randn(1, 5, 6)
    image = EncodedImage(item, plan, Features(vision, keys))
    (tile,) = image.tiles(8)
    assert torch.equal(tile.vision, vision[0, :, :8])
    kept = torch.tensor([1, 4])
    assert torch.equal(PrunedModel.join(cast("Any", None), image, [kept]), vision[0, kept])


INTERNVL = SimpleNamespace(
    vision_config=SimpleNamespace(image_size=448, patch_size=14, hidden_size=1024),
    llm_config=SimpleNamespace(architectures=["Qwen3ForCausalLM"], hidden_size=4096),
    force_image_size=448,
    downsample_ratio=0.5,
)


def internvl_item(num_tiles: int) -> Any:
    item = image_item((0, 0))
    item.feature = torch.zeros(num_tiles, 3, 2, 2)
    return item


@pytest.mark.parametrize(
    ("num_tiles", "budget", "kept"), [(1, "10%", 25), (13, "10%", 332), (13, 64, 64), (7, "all", 1792), (1, 999, 256)]
)
def test_tiles_of_internvl_share_the_budget_of_their_image(num_tiles: int, budget: int | str, kept: int) -> None:
    family, num_tokens = InternVL3(), 256 * num_tiles
    assert family.num_kept(internvl_item(num_tiles), num_tokens, Budget.parse(budget), INTERNVL) == kept
    assert family.selection_size(internvl_item(num_tiles), num_tokens, kept, INTERNVL) == (num_tokens, kept)


def test_placeholders_of_another_number_than_the_tiles_of_internvl_have_are_refused() -> None:
    with pytest.raises(ValueError, match="the prompt has 512 placeholders for an image of 768 tokens"):
        InternVL3().num_kept(internvl_item(3), 512, Budget(tokens=64), INTERNVL)


def test_features_of_internvl_are_as_wide_as_four_patches() -> None:
    assert (InternVL3().vision_width(INTERNVL), InternVL3().keys_width(INTERNVL)) == (4096, 4096)


@pytest.mark.parametrize("name", ["InternLM2ForCausalLM", "GptOssForCausalLM", "Qwen3MoeForCausalLM"])
def test_an_internvl_with_another_language_model_is_refused(name: str) -> None:
    config = SimpleNamespace(llm_config=SimpleNamespace(architectures=[name]))
    assert InternVL3().obstacle(config) == f"its language model is a {name}, not verified"
    assert InternVL3().obstacle(INTERNVL) is None


@pytest.mark.parametrize("placeholder", ["<image>", "<IMG_CONTEXT>"])
def test_placeholders_of_internvl(placeholder: str) -> None:
    """The second is that of SGLang's own chat template."""
    check = InternVL3.placeholder_rule.check
    check(f"{placeholder}What is it?", 1)
    for typed in ("<image>", "<IMG_CONTEXT>"):
        with pytest.raises(ValueError, match="the prompt has 2 image placeholders"):
            check(f"{placeholder}What is {typed}?", 1)
    for typed in ("<img>", "</img>", "<video>", "<<<__IMG_PLACEHOLDER__>>>"):
        with pytest.raises(ValueError, match=f"the text beside the images has {typed}"):
            check(f"{placeholder}What is {typed}?", 1)


@pytest.mark.parametrize("name", ["image_max_dynamic_patch", "max_dynamic_patch"])
@pytest.mark.parametrize(
    ("asked", "is_refused"), [(None, False), (1, False), (63, False), (64, True), (-1, True), ("6", True)]
)
def test_tiles_beyond_what_is_selected_from_are_refused(
    name: str, asked: Any, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sglangs(*_: Any, **__: Any) -> str:
        return "processed"

    monkeypatch.setattr(internvl3, "current", lambda: SimpleNamespace(settings=SimpleNamespace(limits=Limits())))
    processor = SimpleNamespace(num_image_token=256, _processor=None, IMAGE_MAX_NUM=12)
    request = SimpleNamespace(**{name: asked})
    call = InternVL3().process(sglangs, processor, ["image"], input_text="<image>", request_obj=request)
    if is_refused:
        with pytest.raises(ValueError, match=f"^{name} is a whole number of tiles .*, at most 63, got"):
            asyncio.run(call)
    else:
        assert asyncio.run(call) == "processed"


@pytest.mark.parametrize(
    ("asked", "num_images", "is_refused"),
    # 8 x 64,000,000 pixels are 2,551 tiles, the thumbnails counted.
    [
        ({}, 196, False),
        ({}, 197, True),
        ({"max_dynamic_patch": 63}, 39, False),
        ({"max_dynamic_patch": 63}, 40, True),
        ({"image_max_dynamic_patch": 1, "max_dynamic_patch": 63}, 256, False),
        ({"max_dynamic_patch": 0}, 197, True),
    ],
)
def test_tiles_of_a_request_beyond_its_pixels_are_refused(
    asked: dict[str, int], num_images: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sglangs(*_: Any, **__: Any) -> str:
        return "processed"

    monkeypatch.setattr(internvl3, "current", lambda: SimpleNamespace(settings=SimpleNamespace(limits=Limits())))
    processor = SimpleNamespace(num_image_token=256, _processor=None, IMAGE_MAX_NUM=12)
    call = InternVL3().process(
        sglangs, processor, ["image"] * num_images, input_text="", request_obj=SimpleNamespace(**asked)
    )
    with pytest.raises(ValueError, match="this server takes 2,551 tiles in a request") if is_refused else nullcontext():
        assert asyncio.run(call) == "processed"


CLIP = SimpleNamespace(vision_config=SimpleNamespace(model_type="clip_vision_model", image_size=336, patch_size=14))
SIGLIP = SimpleNamespace(vision_config=SimpleNamespace(model_type="siglip_vision_model"))


@pytest.mark.parametrize(
    ("family", "config", "cannot"),
    [
        (Qwen25VL, QWEN, ["visionzip"]),
        (Qwen3VL, QWEN, ["visionzip"]),
        (Qwen35, QWEN, ["visionzip"]),
        (Llava15, CLIP, []),
        (Llava15, SIGLIP, ["visionzip", "downsample"]),
        (LlavaNext, CLIP, ["downsample"]),
        (LlavaNext, SIGLIP, ["visionzip", "downsample"]),
        (InternVL3, INTERNVL, ["visionzip", "downsample"]),
    ],
)
def test_methods_that_a_model_cannot_run(family: type[Family], config: Any, cannot: list[str]) -> None:
    assert [method for method in get_args(MethodName) if family().obstacle_to(method, config)] == cannot


@pytest.mark.parametrize(("num_kept", "grid"), [(57, (7, 8)), (4, (2, 2)), (576, (24, 24)), (600, (24, 24))])
def test_llava_scales_the_pixels_down(num_kept: int, grid: tuple[int, int]) -> None:
    item = image_item((0, 575))
    # A ramp from left to right: scaled, it is a ramp again.
    item.feature = torch.linspace(-1, 1, 336).expand(1, 3, 336, 336)
    assert Llava15().shrink_item(item, 576, num_kept, CLIP) == grid[0] * grid[1]
    assert item.feature.shape == (1, 3, grid[0] * 14, grid[1] * 14)
    assert ("interpolate_pos_encoding" in item.model_specific_data) is (num_kept < 576)
    row = item.feature[0, 0, 0]
    places = (torch.arange(len(row)) + 0.5) * 336 / len(row) - 0.5
    inner = slice(2, -2)
    assert torch.allclose(row[inner], (places / 335 * 2 - 1)[inner], atol=1e-3)


PROCESSOR = SimpleNamespace(
    image_config={},
    _processor=SimpleNamespace(
        image_processor=SimpleNamespace(
            patch_size=14, merge_size=2, size={"shortest_edge": 4 * 784, "longest_edge": 1280 * 784}
        )
    ),
)


def shrunk(
    image: Any,
    budget: str | int = "all",
    *,
    encoder_scale: float = 1,
    processor: Any = PROCESSOR,
    min_tokens_in: int = 0,
    request: Any = None,
) -> Any:
    settings = replace(make_settings(), min_tokens_in=min_tokens_in)
    asked = Requested(Budget.parse(budget), "mmtok" if encoder_scale < 1 else "downsample", 0, encoder_scale)
    (smaller,) = asyncio.run(Qwen25VL().shrink_images([image], asked, settings, processor, request))
    return smaller


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        ((336, 336), "10%", (112, 84)),
        ((336, 252), 54, (252, 168)),
        ((345, 330), 36, (168, 168)),
        ((336, 336), 4, (56, 56)),
    ],
)
def test_qwen_is_given_a_smaller_image(size: tuple[int, int], budget: str | int, expected: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    smaller = shrunk(image, budget)
    assert (smaller.size, smaller.mode, smaller.getpixel((0, 0))) == (expected, "RGB", (255, 0, 0))


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((336, 336), 0.5, (168, 168)),
        # The processor makes it 336 x 252 first.
        ((345, 260), 0.5, (168, 112)),
        ((336, 336), 0.99, None),
        ((336, 336), 1e-300, (56, 56)),
        # Both keep a column of tokens, and stop where the processor would enlarge the image.
        ((28, 1120), 0.1, (28, 364)),
        ((28, 1120), 0.3, (28, 364)),
        ((28, 1120), 0.6, (28, 672)),
        ((56, 56), 0.5, None),
    ],
)
def test_an_encoder_scale_is_of_each_side(size: tuple[int, int], scale: float, expected: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    smaller = shrunk(image, encoder_scale=scale)
    assert (smaller is image) if expected is None else (smaller.size == expected)


def test_no_scale_gives_an_image_that_the_processor_would_size_anew() -> None:
    """It is scaled once, and no side is longer than the processor would have made it."""
    rng = random.Random(0)
    for _ in range(100):
        size = rng.randrange(9, 900), rng.randrange(9, 900)
        image = Image.new("RGB", size)
        height, width = smart_resize(size[1], size[0], 28, 4 * 784, 1280 * 784)
        smaller = shrunk(image, encoder_scale=rng.random())
        if smaller is not image:
            assert smart_resize(smaller.height, smaller.width, 28, 4 * 784, 1280 * 784) == smaller.size[::-1]
            assert (smaller.width <= width, smaller.height <= height) == (True, True)


def test_an_image_that_is_scaled_to_a_longer_shape_than_the_processor_takes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"too long for the processor: .* must be smaller than 200, got 293"):
        shrunk(Image.new("RGB", (8200, 41)), encoder_scale=0.75)


def test_an_image_that_is_small_enough_is_not_scaled() -> None:
    image = Image.new("RGB", (112, 112))
    assert shrunk(image, 16) is image
    assert shrunk(image, 4, min_tokens_in=17) is image
    assert shrunk(image, 4, min_tokens_in=16) is not image
    assert shrunk(image, encoder_scale=0.5, min_tokens_in=17) is image
    assert shrunk(image, encoder_scale=0.5, min_tokens_in=16) is not image


def test_an_image_is_scaled_from_what_the_processor_would_make_of_it() -> None:
    image = Image.new("RGB", (1120, 1120))
    smaller = shrunk(
        image, "25%", processor=SimpleNamespace(**vars(PROCESSOR) | {"image_config": {"max_pixels": 78400}})
    )
    assert smaller.size == (140, 140)


def test_what_the_processor_would_enlarge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 tokens of an image are below .* mmtok_budget of 4 tokens or more"):
        shrunk(Image.new("RGB", (336, 336)), 3)


@pytest.mark.parametrize("name", ["mm_hashes", "mm_content_hashes"])
def test_images_named_by_the_caller_are_not_scaled(name: str) -> None:
    image = Image.new("RGB", (336, 336))
    with pytest.raises(ValueError, match=f"downsample changes the images, which {name} names"):
        shrunk(image, "10%", request=SimpleNamespace(**{name: ["00ff"]}))
    with pytest.raises(ValueError, match=f"mmtok_encoder_scale 0.5 changes the images, which {name} names"):
        shrunk(image, encoder_scale=0.5, request=SimpleNamespace(**{name: ["00ff"]}))
    shrunk(image, "10%", request=SimpleNamespace(**{name: [None]}))


@pytest.mark.parametrize("source", [b"no image", "data:image/png;base64,aGVsbG8=", "/no/such/file.png"])
def test_an_image_that_cannot_be_read_is_refused(source: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - SGLang's messages vary with the source
        shrunk(source, "10%")


def test_a_hash_that_came_with_the_image_is_named_as_it_was_sent() -> None:
    # SGLang moves it to the request before the plugin sees it.
    image = ImageData("data:,", content_hash="sha256:" + 64 * "0")
    with pytest.raises(ValueError, match=r"which content_hash names: send no content_hash$"):
        shrunk(image, "10%", request=SimpleNamespace(mm_content_hashes=[image.content_hash]))


def test_the_encoder_takes_as_many_patches_at_a_time_as_a_cpu_has_memory_for() -> None:
    sides = [100, 100, 40, 146, 200, 10]
    items = [SimpleNamespace(is_video=lambda: False, image_grid_thw=torch.tensor([[1, side, side]])) for side in sides]
    parts = [[int(item.image_grid_thw[0, 1]) for item in part] for part in _parts(items)]
    assert parts == [[100, 100], [40], [146], [200], [10]]


def test_videos_that_sglang_left_as_one_item_are_separated() -> None:
    grids, pixels = torch.tensor([[2, 4, 4], [1, 4, 8]]), torch.arange(64.0)[:, None]
    item = MultimodalDataItem(
        modality=Modality.VIDEO,
        offsets=[(3, 10), (14, 21)],
        feature=pixels,
        model_specific_data={"video_grid_thw": grids, "second_per_grid_ts": torch.tensor([1.0, 0.5])},
    )
    output = SimpleNamespace(mm_items=[item])
    Qwen25VL().separate_videos(output)
    one, other = output.mm_items
    assert (one.offsets, other.offsets) == ([(3, 10)], [(14, 21)])
    assert by_frame(one).video_grid_thw.tolist() == [[1, 4, 4], [1, 4, 4]]
    assert by_frame(other).video_grid_thw.tolist() == [[1, 4, 8]]
    assert by_frame(item) is item
    # What a caller may send in the place of an image.
    brought = qwen_item([[1, 4, 4]])
    brought.frames_apart = True
    assert by_frame(brought) is brought
    assert torch.equal(torch.cat([one.feature, other.feature]), pixels)
    assert (one.video_grid_thw.tolist(), other.video_grid_thw.tolist()) == ([[2, 4, 4]], [[1, 4, 8]])
    assert (one.second_per_grid_ts.tolist(), other.second_per_grid_ts.tolist()) == ([1.0], [0.5])
    assert [Qwen25VL().num_frames(each) for each in (one, other, qwen_item([[1, 4, 4]]))] == [2, 1, 1]


def test_a_long_prompt_with_images_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = object.__new__(Qwen3VLProcessor)
    built: list[tuple[str, Any]] = []

    def build(_: Any, text: str, grids: Any) -> int:
        built.append((text, grids))
        return len(built)

    monkeypatch.setattr(Qwen3VLProcessor, "_build_image_prompt_template", build)
    short, long = ("a", ((1, 4, 4),)), [("b" * 40_000, ((1, 4, 4),)), ("c", ((1, 64, 64),) * 9)]
    for text, grids in (short, *long, short, *long):
        processor._cached_image_prompt_template(text, grids)
    assert built == [short, *long, *long]
