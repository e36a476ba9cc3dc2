"""Pixels travel to the scheduler as 8-bit values, and are normalised on the encoder's device.

A Hugging Face processor makes float32 pixels on the host; for a Qwen each of them twice, since a patch is two
equal frames. As 8-bit values, once each, they are an eighth (for the LLaVAs a quarter) of the bytes to hash, to send
and to copy to the device, where the same float32 operations give the same pixels.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["PixelScale", "compact_items", "for_encoder", "normalise_item", "take_over_scaling"]

logger = logging.getLogger(__name__)

_KEY = "mmtok_pixels"
_SCALING = ("do_rescale", "do_normalize")
_CONSTANTS = ("rescale_factor", "image_mean", "image_std")


@dataclass(frozen=True, slots=True)
class PixelScale:
    """How 8-bit pixels become the encoder's: (value - mean) / std, by channel, in float32.

    Args:
        mean: Mean of each channel, in units of an 8-bit value.
        std: Standard deviation of each channel, likewise.
        num_frames: Equal frames that a patch holds; 1 where the processor makes whole images.
    """

    mean: list[float]
    std: list[float]
    num_frames: int = 1

    def compact(self, pixels: Tensor) -> Tensor:
        """Returns each 8-bit value once: [n, C * P * P] of patches [n, C * F * P * P]; whole images as they are."""
        if self.num_frames == 1:
            return pixels
        frames = pixels.view(len(pixels), len(self.mean), self.num_frames, -1)
        return frames[:, :, 0].flatten(1).contiguous()

    def normalise(self, pixels: Tensor, device: torch.device) -> Tensor:
        """Returns float32 pixels on `device`, bit for bit those of the processor.

        Args:
            pixels: What `compact` returned: uint8.
            device: The encoder's.

        Source: transformers 5.19 image_processing_backends.py, `rescale_and_normalize`.
        """
        num_channels = len(self.mean)
        mean, std = (
            torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True).view(num_channels, 1)
            for values in (self.mean, self.std)
        )
        values = pixels.to(device, non_blocking=True).to(torch.float32)
        # Patches are [n, C * P * P], images [n, C, H, W] or [C, H, W].
        channels = values.view(len(values), num_channels, -1) if values.dim() == 2 else values.flatten(-2)
        channels.sub_(mean).div_(std)
        if self.num_frames == 1:
            return values
        return channels[:, :, None].expand(-1, -1, self.num_frames, -1).flatten(1)


def take_over_scaling(image_processor: Any, image_config: Mapping[str, Any]) -> PixelScale | None:
    """Has the processor leave pixels as 8-bit values; returns how to scale them.

    It is tried on an image: unless the pixels are bit for bit the processor's, it stays as it is, with the reason in
    the log, and None is returned.

    Args:
        image_processor: Hugging Face's, of this process.
        image_config: The server's `--mm-process-config` for images.
    """
    own = [name for name in (*_SCALING, *_CONSTANTS) if name in image_config]
    if own:
        logger.info("MMTok leaves pixels in float32: --mm-process-config sets %s", ", ".join(own))
        return None
    given = {name: getattr(image_processor, name, None) for name in _SCALING}
    try:
        scale = _scale_of(image_processor)
        expected = _pixels_of_noise(image_processor, image_config)
        for name in _SCALING:
            setattr(image_processor, name, False)
        found = _pixels_of_noise(image_processor, image_config)
        if found.dtype != torch.uint8:
            raise TypeError(f"its pixels are {found.dtype}")
        if not torch.equal(scale.normalise(scale.compact(found), torch.device("cpu")), expected):
            raise ValueError("its pixels are other ones")
    except Exception as error:  # a processor of another kind may raise anything
        for name, value in given.items():
            setattr(image_processor, name, value)
        logger.info("MMTok leaves pixels in float32 for %s: %s", type(image_processor).__name__, error)
        return None
    return scale


def _pixels_of_noise(image_processor: Any, image_config: Mapping[str, Any]) -> Tensor:
    noise = np.random.default_rng(0).integers(0, 256, (168, 140, 3), dtype=np.uint8)
    pixels: Tensor = image_processor(images=[Image.fromarray(noise)], return_tensors="pt", **image_config)[
        "pixel_values"
    ]
    return pixels


def _scale_of(image_processor: Any) -> PixelScale:
    if not (image_processor.do_rescale and image_processor.do_normalize):
        raise ValueError("it does not rescale and normalise")
    # In float32 and in this order, as the processor fuses the two steps.
    mean, std = (
        torch.tensor(values) * (1.0 / image_processor.rescale_factor)
        for values in (image_processor.image_mean, image_processor.image_std)
    )
    return PixelScale(mean.tolist(), std.tolist(), getattr(image_processor, "temporal_patch_size", 1))


def compact_items(items: Sequence[Any], scale: PixelScale) -> None:
    """Leaves on each of SGLang's items of 8-bit pixels how they are to be scaled, and each pixel once.

    Items of one tensor, as those of an image that a request repeats, share what is made of it.
    """
    compacted: dict[int, tuple[Tensor, Tensor]] = {}
    for item in items:
        pixels = item.feature
        if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
            if id(pixels) not in compacted:
                compacted[id(pixels)] = pixels, scale.compact(pixels)
            item.feature = compacted[id(pixels)][1]
            item.model_specific_data[_KEY] = asdict(scale)


def for_encoder(items: Sequence[Any], device: torch.device) -> list[Any]:
    """Returns the items as SGLang's encoder takes them: pixels normalised, and nothing of the plugin's beside them.

    The given items keep their 8-bit pixels.

    Args:
        items: SGLang's.
        device: The encoder's.
    """
    return [_for_encoder(item, device) for item in items]


def normalise_item(item: Any) -> None:
    """Makes an item's pixels, in place, those that the encoder takes."""
    if _KEY in item.model_specific_data:
        item.feature = _for_encoder(item, item.feature.device).feature
        del item.model_specific_data[_KEY]


def _for_encoder(item: Any, device: torch.device) -> Any:
    data = item.model_specific_data
    copied = copy.copy(item)
    copied.model_specific_data = {name: value for name, value in data.items() if not name.startswith("mmtok")}
    if _KEY in data:
        copied.feature = PixelScale(**data[_KEY]).normalise(item.feature, device)
    return copied
