"""Which patches of an image a checkpoint's selection keeps, computed in this process with Hugging Face's encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.vision_utils import get_vision_window_index

from mmtok_deploy import Selection, select_tokens
from mmtok_deploy.guidance import guidance_words
from mmtok_deploy.padding import padding_mask
from mmtok_deploy.presets import PRESETS
from mmtok_deploy.selection import BudgetLike

__all__ = ["OneGridFamily", "SelectedPatches", "select_patches"]

OneGridFamily = Literal["qwen2.5-vl", "llava-1.5"]
"""The families that see an image as one grid of patches (LLaVA-NeXT sees tiles)."""


@dataclass(frozen=True, slots=True, eq=False)
class SelectedPatches:
    """A selection on the image that it was made from.

    Args:
        image: The image as the encoder saw it: padded to a square if the checkpoint's processor does that.
        grid: Rows and columns of vision tokens.
        selection: Indices into the grid, counted row by row.
    """

    image: Image.Image
    grid: tuple[int, int]
    selection: Selection


def select_patches(
    family: OneGridFamily, checkpoint: Path, image: Image.Image, question: str, budget: BudgetLike
) -> SelectedPatches:
    """Returns the patches that the family's preset keeps of an image, in float32 on the CPU.

    Args:
        family: Which preset and which features.
        checkpoint: Folder of the checkpoint; it has to be of that family.
        image: RGB.
        question: The user's text, which guides the selection.
        budget: Tokens to keep.

    Raises:
        ValueError: An unknown family, or a budget that is not understood.
    """
    if family not in get_args(OneGridFamily):
        raise ValueError(f"family is one of {', '.join(get_args(OneGridFamily))}, got {family!r}")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    preset = PRESETS[family]
    pixels = processor.image_processor(images=[image], return_tensors="pt")
    words = guidance_words(question, preset.guidance)
    word_ids = processor.tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        text = model.get_input_embeddings()(torch.tensor(word_ids, dtype=torch.int64))
        if family == "qwen2.5-vl":
            vision, keys, grid = _qwen_features(model, pixels)
            seen, excluded = image, None
        else:
            vision, keys, grid = _llava_features(model, pixels)
            seen, excluded = _as_llava_sees(image, processor.image_processor, grid)
        selection = select_tokens(vision, keys, text, budget, config=preset.config, excluded=excluded)
    return SelectedPatches(seen, grid, selection)


def _qwen_features(model: Any, pixels: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    visual = model.model.visual
    grid_thw = pixels["image_grid_thw"]
    before, output = _encode(visual.merger, lambda: model.model.get_image_features(pixels["pixel_values"], grid_thw))
    group = visual.spatial_merge_size
    in_window_order = before.reshape(-1, group * group, before.shape[-1]).mean(dim=1)
    window_index, _ = get_vision_window_index(grid_thw, group, visual.window_size, visual.patch_size)
    rows, columns = (int(patches) // group for patches in grid_thw[0, 1:])
    return output, in_window_order[torch.argsort(window_index)], (rows, columns)


def _llava_features(model: Any, pixels: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    projector = model.model.multi_modal_projector
    before, output = _encode(projector, lambda: model.model.get_image_features(pixels["pixel_values"]))
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    return output, before[0], (side, side)


def _encode(projector: torch.nn.Module, image_features: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Returns what the projector was given, and the first image's features."""
    given: list[Tensor] = []
    hook = projector.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    try:
        features = image_features().pooler_output[0]
    finally:
        hook.remove()
    return given[0], features


def _as_llava_sees(
    image: Image.Image, image_processor: Any, grid: tuple[int, int]
) -> tuple[Image.Image, Tensor | None]:
    """Returns the square image, and which of its patches hold nothing but padding (None where it is cropped)."""
    if not image_processor.do_pad:
        return ImageOps.fit(image, (min(image.size),) * 2), None
    colour = tuple(int(255 * mean) for mean in image_processor.image_mean)
    square = ImageOps.pad(image, (max(image.size),) * 2, color=colour)
    return square, padding_mask(image.height, image.width, image_processor.crop_size["height"], grid[0])
