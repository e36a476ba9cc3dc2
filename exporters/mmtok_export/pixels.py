"""Layouts of an encoder's `pixels`, and photographs in these layouts for the check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok_deploy.photographs import PHOTOGRAPHS, photograph

__all__ = ["CLIP_SCALE", "images_of", "patches_of", "processor_config"]

CLIP_SCALE: dict[str, tuple[float, float, float]] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
"""The constants of CLIP's image processor; those of LLaVA and Qwen2.5-VL have the same."""


def images_of(
    size: tuple[int, int],
    num_images: int,
    *,
    mean: Sequence[float] = CLIP_SCALE["mean"],
    std: Sequence[float] = CLIP_SCALE["std"],
    **_: Any,
) -> Tensor:
    """Returns photographs [B, 3, height, width] float32, normalised.

    Args:
        size: (width, height) in pixels.
        num_images: B; photographs repeat if there are not enough.
        mean: Mean of each channel, for values from 0 to 1.
        std: Standard deviation of each channel, for values from 0 to 1.

    Raises:
        ModuleNotFoundError: scikit-image, which contains them, is not installed.
    """
    names = list(PHOTOGRAPHS)
    pictures = [photograph(names[idx % len(names)]).resize(size) for idx in range(num_images)]
    pixels = torch.stack([torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures])
    images = pixels.view(num_images, size[1], size[0], 3).permute(0, 3, 1, 2) / 255
    centre, spread = (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
    return (images - centre) / spread


def patches_of(images: Tensor, patch_size: int, temporal_patch_size: int, merge_size: int, **_: Any) -> Tensor:
    """Returns the patches of a Qwen's image processor, [B * patches, 3 * frames * patch * patch].

    The patches of a token follow one another. A still image is repeated in all frames of a patch.

    Args:
        images: [B, 3, height, width].
        patch_size: Side of a patch in pixels.
        temporal_patch_size: Number of frames of a patch.
        merge_size: Number of patches on a side of a token.
    """
    num_images, channels, height, width = images.shape
    side = patch_size * merge_size
    cells = images.view(
        num_images, channels, height // side, merge_size, patch_size, width // side, merge_size, patch_size
    )
    # rows of tokens, columns of tokens, row and column in the token, channel, row and column in the patch
    patches = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, channels, 1, patch_size**2)
    return patches.expand(-1, -1, temporal_patch_size, -1).flatten(1)


def processor_config(image_size: Sequence[int], layout: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of the Hugging Face image processor that makes `pixels` from images of this size.

    Args:
        image_size: (width, height) in pixels.
        layout: `pixel_layout` of the encoder.
    """
    has_patches = layout["layout"] == "patches"
    sides = ("patch_size", "temporal_patch_size", "merge_size")
    return {
        "image_processor_type": "Qwen2VLImageProcessor" if has_patches else "CLIPImageProcessor",
        "image_size": {"width": image_size[0], "height": image_size[1]},
        "do_convert_rgb": True,
        # The graph takes one size; the caller scales, crops or pads images to it.
        "do_resize": False,
        **({name: layout[name] for name in sides} if has_patches else {"do_center_crop": False}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(layout["mean"]),
        "image_std": list(layout["std"]),
    }
