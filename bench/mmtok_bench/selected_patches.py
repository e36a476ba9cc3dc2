"""Computes which patches of an image a selection keeps, in this process, with Hugging Face's encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.vision_utils import get_vision_window_index

from mmtok_deploy import Budget, Selection, select_tokens
from mmtok_deploy.config import KeySource
from mmtok_deploy.guidance import guidance_words
from mmtok_deploy.methods import MethodName, comparator
from mmtok_deploy.methods.visionzip import class_token_attention
from mmtok_deploy.padding import padding_mask
from mmtok_deploy.presets import PRESETS, Preset
from mmtok_deploy.problem import SelectionProblem
from mmtok_deploy.selection import BudgetLike

__all__ = ["EncodedImage", "OneGridFamily", "PatchSelector"]

OneGridFamily = Literal["qwen2.5-vl", "llava-1.5"]
"""The families that encode an image as one grid of patches (LLaVA-NeXT and InternVL3 encode tiles)."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """The features of an image from which tokens are selected.

    Args:
        image: The image as the encoder reads it: padded or cropped to a square, if the processor does so.
        grid: Rows and columns of vision tokens.
        token_px: Side in the encoder's pixels of the square that a token covers.
        vision: [N, D] tokens after the projector, row by row.
        keys: [N, d] features before the projector.
        excluded: [N] bool, tokens that are padding; None if none is.
        attention: [N] attention of the class token to each token; None for encoders without a class token.
    """

    image: Image.Image
    grid: tuple[int, int]
    token_px: int
    vision: Tensor
    keys: Tensor
    excluded: Tensor | None
    attention: Tensor | None

    @property
    def num_pickable(self) -> int:
        """The number of tokens that may be picked."""
        return len(self.vision) - (0 if self.excluded is None else int(self.excluded.sum()))


class PatchSelector:
    """Selects the same patches as a server, with a checkpoint's encoder and word embeddings in float32 on the CPU.

    Args:
        family: Family of the checkpoint; decides preset and features.
        checkpoint: Folder of the checkpoint.
        preset: Constants and guidance rule; None for those of the family.

    Raises:
        ValueError: An unknown family.
    """

    def __init__(self, family: OneGridFamily, checkpoint: Path, preset: Preset | None = None) -> None:
        if family not in get_args(OneGridFamily):
            raise ValueError(f"family is one of {', '.join(get_args(OneGridFamily))}, got {family!r}")
        self.family = family
        self.preset = preset or PRESETS[family]
        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(checkpoint)

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> EncodedImage:
        """Returns the features of an RGB image."""
        pixels = self._processor.image_processor(images=[image], return_tensors="pt")
        if self.family == "qwen2.5-vl":
            visual = self._model.config.vision_config
            token_px = visual.patch_size * visual.spatial_merge_size
            grid, vision, keys = _qwen_features(self._model, pixels)
            return EncodedImage(image, grid, token_px, vision, keys, None, None)
        grid, vision, keys, attention = _llava_features(self._model, pixels)
        seen, excluded = _as_llava_sees(image, self._processor.image_processor, grid)
        token_px = self._model.config.vision_config.patch_size
        return EncodedImage(seen, grid, token_px, vision, keys, excluded, attention)

    @torch.inference_mode()
    def embed(self, question: str) -> Tensor:
        """Returns [M, D] the embeddings of the question's guidance words."""
        words = guidance_words(question, self.preset.guidance)
        word_ids = self._processor.tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
        embedded: Tensor = self._model.get_input_embeddings()(torch.tensor(word_ids, dtype=torch.int64))
        return embedded

    @torch.inference_mode()
    def select(
        self,
        image: EncodedImage,
        text: Tensor,
        budget: BudgetLike,
        method: MethodName = "mmtok",
        keys: KeySource = "input",
    ) -> Selection:
        """Returns the tokens of an image that a method keeps.

        Args:
            image: Result of `encode`.
            text: Result of `embed`.
            budget: Tokens to keep. Excluded tokens are kept only at a budget of all tokens.
            method: Name of the method. `random` draws with seed 0; a server's seed depends on image, question and
                budget.
            keys: The side of the projector by whose features tokens are compared.

        Raises:
            ValueError: A budget that is not understood, or a method that cannot run on the features.
        """
        num_kept = Budget.parse(budget).num_kept(len(image.vision))
        compared = image.vision if keys == "output" else image.keys
        if method == "mmtok":
            features = (image.vision, compared, text)
            return select_tokens(*features, num_kept, config=self.preset.config, excluded=image.excluded)
        problem = SelectionProblem(
            *(image.vision, compared, text, min(num_kept, image.num_pickable), image.excluded, image.attention)
        )
        (selection,) = comparator(method)([problem], self.preset.config)
        return selection


def _qwen_features(model: Any, pixels: Any) -> tuple[tuple[int, int], Tensor, Tensor]:
    visual = model.model.visual
    grid_thw = pixels["image_grid_thw"]
    before, output = _encode(visual.merger, lambda: model.model.get_image_features(pixels["pixel_values"], grid_thw))
    group = visual.spatial_merge_size
    in_window_order = before.reshape(-1, group * group, before.shape[-1]).mean(dim=1)
    window_index, _ = get_vision_window_index(grid_thw, group, visual.window_size, visual.patch_size)
    rows, columns = (int(patches) // group for patches in grid_thw[0, 1:])
    return (rows, columns), output, in_window_order[torch.argsort(window_index)]


def _llava_features(model: Any, pixels: Any) -> tuple[tuple[int, int], Tensor, Tensor, Tensor | None]:
    projector, config = model.model.multi_modal_projector, model.config.vision_config
    queries_and_keys: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        # Other towers than CLIP have no class token.
        if config.model_type == "clip_vision_model":
            layer = model.config.vision_feature_layer
            layer = layer if isinstance(layer, int) else layer[-1]
            # Feature 0 is the embeddings, feature 1 the output of layer 0.
            attention = model.model.vision_tower.encoder.layers[layer if layer < 0 else layer - 1].self_attn
            for projection in (attention.q_proj, attention.k_proj):
                hook = projection.register_forward_hook(lambda _, __, output: queries_and_keys.append(output))
                hooks.callback(hook.remove)
        before, output = _encode(projector, lambda: model.model.get_image_features(pixels["pixel_values"]))
    side = config.image_size // config.patch_size
    paid = None
    if queries_and_keys:
        queries, keys = queries_and_keys
        paid = class_token_attention(queries, keys, attention.num_heads)[0]
    return (side, side), output, before[0], paid


def _encode(projector: torch.nn.Module, image_features: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Returns the projector's input, and the first image's features."""
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
    """Returns the square image, and which of its patches are only padding (None if it was cropped)."""
    if not image_processor.do_pad:
        return ImageOps.fit(image, (min(image.size),) * 2), None
    colour = tuple(int(255 * mean) for mean in image_processor.image_mean)
    square = ImageOps.pad(image, (max(image.size),) * 2, color=colour)
    return square, padding_mask(image.height, image.width, image_processor.crop_size["height"], grid[0])
