"""What is measured on which machine: models, image sizes, budgets and loads, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mmtok_bench.families import Family

__all__ = ["PRESETS", "ImageKind", "PrefixCache", "ServedModel", "Size", "Sweep", "preset_for_device"]

ImageKind = Literal["photograph", "random"]
PrefixCache = Literal["off", "on"]
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of a preset.

    Args:
        name: In rows and on the command line; one of `DUMMY_MODELS`, or what a checkpoint's folder is called.
        family: Decides how an image can be sent smaller.
        sizes_px: Image sizes that are sent.
        budgets: Values of `--mmtok-budget` beside `all`.
        model_path: A checkpoint; None for the model without weights of this name.
    """

    name: str
    family: Family
    sizes_px: tuple[Size, ...]
    budgets: tuple[str, ...]
    model_path: str | None = None


@dataclass(frozen=True, slots=True)
class Sweep:
    """Everything that `mmtok bench serve` measures in one go.

    Args:
        preset: Its name.
        device: Where the servers compute.
        models: One after the other.
        concurrencies: Requests under way at a time.
        image_kinds: Photographs, random pixels, or both.
        prefix_caches: "off": servers without one, every image new. "on": images that the server has seen before,
            each with another question.
        num_requests: Of each cell and round, at least; never fewer than twice the concurrency.
        output_tokens: Length of every answer.
        rounds: How often the servers take turns.
        side_by_side: All servers of a model run at once, and idle ones sleep. Otherwise one runs at a time.
        arguments: Of every server.
    """

    preset: str
    device: Literal["cpu", "cuda"]
    models: tuple[ServedModel, ...]
    concurrencies: tuple[int, ...]
    image_kinds: tuple[ImageKind, ...] = ("photograph",)
    prefix_caches: tuple[PrefixCache, ...] = ("off",)
    num_requests: int = 32
    output_tokens: int = 64
    rounds: int = 2
    side_by_side: bool = False
    arguments: tuple[str, ...] = ()

    def requests_of(self, concurrency: int) -> int:
        """Returns the number of requests of one cell in one round."""
        return max(self.num_requests, 2 * concurrency)


# The paper's Tables 12 and 13: 867.6 tokens on average to 86.8 (1008 x 672 pixels are 864), up to 2880 to 160, and 576
# to 64. The smaller images say where pruning stops to pay.
_QWEN_7B = ServedModel("qwen2.5-vl-7b", "qwen2.5-vl", ((1008, 672), (448, 448), (224, 224)), ("20%", "10%", "5%"))
_NEXT_SIZES: tuple[Size, ...] = ((672, 672), (672, 336))
_NEXT_7B = ServedModel("llava-next-7b", "llava-next", _NEXT_SIZES, ("160",))
_NEXT_13B = ServedModel("llava-next-13b", "llava-next", _NEXT_SIZES, ("160",))
_LLAVA_7B = ServedModel("llava-1.5-7b", "llava-1.5", ((336, 336),), ("64",))
_LLAVA_13B = ServedModel("llava-1.5-13b", "llava-1.5", ((336, 336),), ("64",))

_GPU_MODELS = (_QWEN_7B, _NEXT_7B, _NEXT_13B, _LLAVA_7B, _LLAVA_13B)


def _gpu(name: str, concurrencies: tuple[int, ...]) -> Sweep:
    return Sweep(
        name,
        "cuda",
        _GPU_MODELS,
        concurrencies,
        image_kinds=("photograph", "random"),
        prefix_caches=("off", "on"),
    )


PRESETS: Mapping[str, Sweep] = {
    # 48 GB: a 13B model in half precision leaves room for 8 images of 2928 tokens at a time.
    "a6000": _gpu("a6000", (1, 4, 16)),
    "h100": _gpu("h100", (1, 4, 16, 64)),
    "h200": _gpu("h200", (1, 4, 16, 64)),
    "cpu": Sweep(
        "cpu",
        "cpu",
        (
            ServedModel("qwen2.5-vl-0.5b", "qwen2.5-vl", ((1008, 784), (224, 224)), ("10%", "5%")),
            ServedModel("llava-1.5-0.5b", "llava-1.5", ((448, 448),), ("10%", "5%")),
        ),
        concurrencies=(1, 4),
        num_requests=6,
        output_tokens=8,
        rounds=1,
        side_by_side=True,
        # Measured on an EPYC with AVX-512 BF16: products four to six times as fast as in float32.
        arguments=("--dtype=bfloat16",),
    ),
}


def preset_for_device(name: str | None) -> str:
    """Returns the preset that fits an accelerator of this name; "cpu" for None.

    An accelerator that no preset is for gets the one for the smallest memory, a6000.
    """
    if name is None:
        return "cpu"
    return next((preset for preset in ("h200", "h100") if preset in name.lower()), "a6000")
