"""LLaVA-1.5 on SGLang's Transformers backend: one square image, whose padding is never picked."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import override

from mmtok_deploy.methods import MethodName
from mmtok_deploy.methods.downsample import grid_within
from mmtok_deploy.padding import padding_mask
from mmtok_deploy.repeated_tokens import WHOLE, Box
from mmtok_sglang.families.llava import Llava
from mmtok_sglang.pixels import normalise_item
from mmtok_sglang.transformers_backend import TransformersModel, TransformersProcessor, separate_images

__all__ = ["Llava15"]

_SIZES = "mmtok_image_sizes"


class LlavaForConditionalGeneration(TransformersModel):
    """The model: SGLang 0.5.23's own of this name does not load (models/llava.py, line 788)."""


class LlavaProcessor(TransformersProcessor):
    """The processor: where it pads images to squares, it keeps their sizes for `Llava15.excluded`."""

    models: ClassVar[list[type]] = [LlavaForConditionalGeneration]

    @override
    def _apply_hf_processor(self, text: str, images: Any = None, videos: Any = None) -> Any:
        result = super()._apply_hf_processor(text, images, videos)
        if images and getattr(self._processor.image_processor, "do_pad", False):
            result["image_sizes"] = torch.tensor([(image.height, image.width) for image in images])
        return result


class Llava15(Llava):
    """A fixed number of tokens an image (576 at 336 pixels); kept tokens take its place, positions run on."""

    model_class = LlavaForConditionalGeneration
    processor_class = LlavaProcessor

    def separate_images(self, output: Any, processor: Any) -> None:
        """Splits the images by what the Hugging Face processor counts for each."""
        (bundle,) = output.mm_items
        sizes = [tuple(pixels.shape[-2:]) for pixels in bundle.feature]
        counts = processor._processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        separate_images(output, counts)
        for item in output.mm_items:
            # Ours, not the model's: the encoder takes no sizes.
            item.model_specific_data[_SIZES] = item.model_specific_data.pop("image_sizes", None)

    def box_seen(self, processor: Any, width: int, height: int) -> Box:
        """Returns the square in the middle of an image, if the processor crops to it."""
        images = processor._processor.image_processor
        if not getattr(images, "do_center_crop", False) or getattr(images, "do_pad", False):
            return WHOLE
        side = min(width, height)
        left, top = (width - side) / (2 * width), (height - side) / (2 * height)
        return left, top, 1 - left, 1 - top

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
            normalise_item(item)
            size = (rows * patch, columns * patch)
            pixels = interpolate(item.feature.float(), size, mode="bicubic", antialias=True)
            item.feature = pixels.to(item.feature.dtype)
            item.model_specific_data["interpolate_pos_encoding"] = True
        return rows * columns
