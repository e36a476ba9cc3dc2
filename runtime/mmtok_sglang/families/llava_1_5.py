"""LLaVA-1.5 on SGLang's Transformers backend: one square image, whose padding is never picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmtok_deploy.methods import MethodName
from mmtok_deploy.methods.downsample import grid_within
from mmtok_sglang.families.llava import Llava
from mmtok_sglang.feature_cache import FeatureCache
from mmtok_sglang.hooks import Hook
from mmtok_sglang.selection import ImageTokens, TokenSelector, without_non_finite
from mmtok_sglang.stages import StageMetrics
from mmtok_sglang.transformers_backend import (
    EncodedImage,
    backend_hooks,
    separate_images,
)

__all__ = ["Llava15", "padding_mask"]

_SIZES = "mmtok_image_sizes"


class Llava15(Llava):
    """A fixed number of tokens an image (576 at 336 pixels); kept tokens take its place, positions run on."""

    architecture = "LlavaForConditionalGeneration"

    def separate_images(self, output: Any, processor: Any) -> None:
        """Splits the images by what the Hugging Face processor counts for each."""
        (bundle,) = output.mm_items
        sizes = [tuple(pixels.shape[-2:]) for pixels in bundle.feature]
        counts = processor._processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        separate_images(output, counts)
        for item in output.mm_items:
            # Ours, not the model's: the encoder takes no sizes.
            item.model_specific_data[_SIZES] = item.model_specific_data.pop("image_sizes", None)

    def excluded(self, item: Any) -> Tensor | None:
        """Returns the patches that lie wholly in the padding, if the processor pads to a square."""
        sizes = item.model_specific_data.get(_SIZES)
        if sizes is None:
            return None
        ((start, end),) = item.offsets
        height, width = sizes[0].tolist()
        mask = padding_mask(height, width, item.feature.shape[-1], int((end - start + 1) ** 0.5))
        return mask if mask.any() else None

    def obstacle_to(self, method: MethodName, config: Any) -> str | None:
        """Returns why the model cannot run a method: CLIP alone is known to interpolate its positions."""
        if method == "downsample" and config.vision_config.model_type == "clip_vision_model":
            return None
        return super().obstacle_to(method, config)

    def shrink_item(self, item: Any, num_tokens: int, num_kept: int, config: Any) -> int:
        """Returns the patches of the square after scaling its pixels down to a grid of at most `num_kept` patches.

        Bicubic with antialiasing, as the processor scales; the encoder interpolates its position embeddings to the
        grid (Transformers' `interpolate_pos_encoding`), since it was trained at one size alone.
        """
        patch = config.vision_config.patch_size
        height, width = item.feature.shape[-2:]
        rows, columns = grid_within(height // patch, width // patch, num_kept)
        if rows * columns < num_tokens:
            size = (rows * patch, columns * patch)
            pixels = interpolate(item.feature.float(), size, mode="bicubic", antialias=True)
            item.feature = pixels.to(item.feature.dtype)
            item.model_specific_data["interpolate_pos_encoding"] = True
        return rows * columns

    def model_hooks(self, cache: FeatureCache, selector: TokenSelector, stages: StageMetrics) -> list[Hook]:
        """Returns the hooks on the processor, which forgets the images' sizes, and on the backend."""

        def select(model: Any, images: Sequence[EncodedImage]) -> list[Tensor]:
            squares = [
                ImageTokens(
                    *(image.names, image.plan, image.features.vision[0], image.features.keys[0]),
                    image.plan.num_kept,
                    None if image.features.attention is None else image.features.attention[0],
                )
                for image in images
            ]
            kept = selector.select(squares, model.model.get_input_embeddings())
            return [without_non_finite(square.vision[indices]) for square, indices in zip(squares, kept, strict=True)]

        return [
            Hook(
                "multimodal.processors.transformers_auto.TransformersAutoMultimodalProcessor._apply_hf_processor",
                "self text images videos",
                _keep_image_sizes,
            ),
            *backend_hooks(cache, select, stages),
        ]


def padding_mask(height: int, width: int, side: int, patches: int) -> Tensor:
    """Returns [patches * patches] bool: the patches of a padded square that hold no pixel of the image.

    Args:
        height: The image's, in pixels.
        width: The image's, in pixels.
        side: The square's side after resizing, in pixels.
        patches: Patches along the side.

    Source: Ironieser/MMTok mmtok/llava/patch_llava.py, `calculate_padding_patch_indices` without overlap.
    """
    patch = side // patches
    rows, columns = (_padded_lines(length, max(height, width), side, patch, patches) for length in (height, width))
    return (rows[:, None] | columns[None, :]).flatten()


def _padded_lines(length: int, longest: int, side: int, patch: int, patches: int) -> Tensor:
    padding = side - round(length * (side / longest))
    before = padding // 2
    line = torch.arange(patches)
    return (line < before // patch) | (line >= patches - (padding - before) // patch)


def _keep_image_sizes(
    original: Callable[..., Any], processor: Any, text: Any, images: Any = None, videos: Any = None
) -> Any:
    """Runs the Hugging Face processor; where it pads to a square, keeps the images' sizes for `excluded`."""
    result = original(processor, text=text, images=images, videos=videos)
    if images and getattr(processor._processor.image_processor, "do_pad", False):
        result["image_sizes"] = torch.tensor([(image.height, image.width) for image in images])
    return result
