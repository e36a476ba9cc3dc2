"""What config.json says about a checkpoint; read before anything slow is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "ANY_SIZE",
    "FAMILIES",
    "EncoderError",
    "check_any_size",
    "check_multiples",
    "check_only_size",
    "check_sizes",
    "family_of",
    "read_json",
]

FAMILIES = {
    "llava": "llava-1.5",
    "llava_next": "llava-next",
    "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "qwen3_vl_moe": "qwen3-vl-moe",
    "qwen3_5": "qwen3.5",
    "qwen3_5_moe": "qwen3.5-moe",
    "glm4v": "glm-4.1v",
    "glm4v_moe": "glm-4.5v",
    "internvl_chat": "internvl3",
    "internvl": "internvl3",
}
"""model_type in config.json -> the name of the family, as presets have it."""

ANY_SIZE = (
    *("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3.5", "qwen3.5-moe"),
    *("glm-4.1v", "glm-4.5v", "internvl3"),
)
"""Families of which one graph can take images of any size."""


class EncoderError(ValueError):
    """The checkpoint, the image size or the dtype is not supported."""


def read_json(checkpoint: Path, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file of the checkpoint.

    Raises:
        EncoderError: The directory or file does not exist, or the file is not a JSON object.
    """
    path = checkpoint / name
    if not path.is_file():
        raise EncoderError(f"expected a Hugging Face checkpoint directory, and {checkpoint} has no {name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise EncoderError(f"{path} holds a JSON {type(content).__name__}: expected an object")
    return content


def family_of(checkpoint: Path) -> str:
    """Returns the name of a checkpoint's family, as presets have it.

    Raises:
        EncoderError: config.json does not exist, or describes no encoder that is supported.
    """
    content = read_json(checkpoint, "config.json")
    family = FAMILIES.get(str(content.get("model_type")))
    has_vision = isinstance(content.get("vision_config"), dict)
    if family is not None and has_vision:
        return family
    lacks = "is of an architecture that is not supported" if has_vision else "has no vision tower"
    raise EncoderError(
        f"{checkpoint} {lacks} (config.json has model_type {content.get('model_type')!r}): "
        f"expected model_type {' or '.join(FAMILIES)} and a vision_config"
    )


def check_any_size(family: str) -> None:
    """Raises EncoderError if no graph of a family can take images of any size."""
    if family not in ANY_SIZE:
        raise EncoderError(
            f"a graph for images of any size can be made of {', '.join(ANY_SIZE)}, got {family}: "
            "name --image-size in place of --tokens"
        )


def check_only_size(image_size: object, side: int) -> None:
    """Raises EncoderError if an image is not the square that a vision tower takes.

    Args:
        image_size: (width, height) in pixels; anything else stands for any size.
        side: Side of the square in pixels.
    """
    if image_size != (side, side):
        got = f"{image_size[0]}x{image_size[1]}" if isinstance(image_size, tuple) else "any"
        raise EncoderError(
            f"the vision tower takes images of {side}x{side}, got {got}: name the size that the image processor scales "
            "to"
        )


def check_multiples(image_size: tuple[int, int], factor: int) -> None:
    """Raises EncoderError if a side of an image, in pixels, is no multiple of a token's side."""
    nearest = [max(factor, round(length / factor) * factor) for length in image_size]
    if nearest != list(image_size):
        raise EncoderError(
            f"width and height are multiples of {factor} px, got {image_size[0]}x{image_size[1]}: "
            f"the nearest size, to which the image processor scales it, is {nearest[0]}x{nearest[1]}"
        )


def check_sizes(checkpoint: Path, image_size: tuple[int, int] | None, *, is_any_size: bool) -> None:
    """Raises EncoderError for what config.json alone shows to be wrong; the encoder's class checks the rest.

    Args:
        checkpoint: Hugging Face checkpoint directory.
        image_size: (width, height) in pixels, if it is given.
        is_any_size: Whether the graph is to take images of any size.
    """
    family = family_of(checkpoint)
    if is_any_size:
        check_any_size(family)
    vision: dict[str, Any] = read_json(checkpoint, "config.json")["vision_config"]
    side, patch, merge = (vision.get(name) for name in ("image_size", "patch_size", "spatial_merge_size"))
    if image_size is None:
        return
    if family.startswith("qwen") and isinstance(patch, int) and isinstance(merge, int):
        check_multiples(image_size, patch * merge)
    elif family.startswith("llava") and isinstance(side, int):
        check_only_size(image_size, side)
