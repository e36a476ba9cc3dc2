"""The arguments of `mmtok export`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from mmtok_deploy.budget import Budget
from mmtok_deploy.config import Coverage, KeySource
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.presets import PRESETS
from mmtok_export.spec import DTYPES, FORMS
from mmtok_export.targets import LIBRARIES

__all__ = ["EXPORT_FOLDER", "add_export_parser"]

EXPORT_FOLDER = Path("artifacts/export")
"""Folder of exported files without --output."""

_SIZES = "a size, MIN:MAX or MIN:OPTIMUM:MAX"
_UNPRUNED = "add the output unpruned_tokens with all tokens"
_LIBRARIES = ("auto", *LIBRARIES)


def add_export_parser(commands: Any) -> None:
    """Adds `mmtok export` and its subcommands to the command line's parser."""
    export = commands.add_parser("export", help="export the selection as an ONNX graph or a TensorRT engine")
    kinds = export.add_subparsers(dest="kind", required=True, metavar="WHAT")

    selection = kinds.add_parser("selection", help="the selection by itself: features in, kept tokens out")
    selection.add_argument(
        "--tokens",
        type=_range,
        default=DimRange.fixed(576),
        metavar="N",
        help=f"vision tokens of an image: {_SIZES} (default 576)",
    )
    selection.add_argument(
        "--batch", type=_range, default=DimRange.fixed(1), metavar="B", help=f"images in a batch: {_SIZES} (default 1)"
    )
    selection.add_argument(
        "--vision-width",
        type=_count,
        metavar="D",
        help="width of vision tokens (default: that of the preset's 7B model)",
    )
    selection.add_argument(
        "--keys-width",
        type=_count,
        metavar="d",
        help="width of features before the projector (default: that of the preset's 7B model)",
    )
    selection.add_argument(
        "--keys",
        choices=get_args(KeySource),
        default="input",
        help="--mmtok-keys of the server: output compares the vision tokens themselves (default input)",
    )
    selection.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of the features (default float16)")
    selection.add_argument(
        "--keys-dtype",
        choices=DTYPES,
        help="dtype of the features before the projector (default: float32 for a Qwen or a GLM, else --dtype)",
    )
    _add_common(selection, "default llava-1.5")

    encoder = kinds.add_parser("encoder", help="a vision encoder with the selection: pixels in, kept tokens out")
    encoder.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint folder")
    size = encoder.add_mutually_exclusive_group()
    size.add_argument(
        "--image-size",
        type=_image_size,
        metavar="WxH",
        help="size of an image in pixels; only a Qwen or a GLM supports several sizes",
    )
    size.add_argument(
        "--tokens",
        type=_range,
        metavar="N",
        help=f"tokens of an image, for a Qwen or a GLM of any size or an InternVL3 of any number of tiles: {_SIZES}",
    )
    encoder.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of the encoder (default float16)")
    encoder.add_argument(
        "--batch-size",
        type=_range,
        metavar="B",
        help=f"images in a batch; for LLaVA-NeXT the tiles of one image: {_SIZES} (default 1; all possible tiles)",
    )
    encoder.add_argument(
        "--random-weights", action="store_true", help="read config.json only, to try sizes and engines"
    )
    encoder.add_argument("--unpruned", action="store_true", help=_UNPRUNED)
    _add_common(encoder, "default: the model's")

    attach = kinds.add_parser(
        "attach", help="an encoder that is an ONNX file already, with the selection added at its end"
    )
    attach.add_argument("--onnx", type=Path, required=True, help="the encoder")
    attach.add_argument("--vision", required=True, metavar="TENSOR", help="tokens after the projector")
    attach.add_argument(
        "--keys", metavar="TENSOR", help="features before the projector; without it, the candidates are printed"
    )
    attach.add_argument(
        "--skip-tokens",
        type=_count_or_zero,
        metavar="S",
        help="number of class and register tokens before the patches (default: from the shapes)",
    )
    attach.add_argument("--map", choices=("nchw", "nhwc"), help="layout of a feature map whose width equals its depth")
    attach.add_argument(
        "--batch",
        type=_range,
        metavar="B",
        help=f"images in a batch, if this is dynamic in the graph: {_SIZES} (default 1:1:8)",
    )
    attach.add_argument(
        "--keys-per-token",
        type=_count,
        default=1,
        metavar="G",
        help="number of consecutive features that are merged into a token (default 1)",
    )
    attach.add_argument("--keys-index", metavar="TENSOR", help="index of the merged feature of each token")
    attach.add_argument(
        "--tokens", type=_range, metavar="N", help=f"tokens of an image, if this is dynamic in the graph: {_SIZES}"
    )
    attach.add_argument("--grid-width", type=_count, help="tokens in a row of an image; adds the output `positions`")
    attach.add_argument(
        "--dim",
        type=_named_range,
        action="append",
        default=[],
        metavar="NAME=RANGE",
        help="range of another dynamic dimension of the graph",
    )
    attach.add_argument("--unpruned", action="store_true", help=_UNPRUNED)
    _add_common(attach, "required if a temperature or alpha is not given")

    engine = kinds.add_parser("engine", help="a TensorRT engine of an exported ONNX file")
    engine.add_argument("file", type=Path, help="an ONNX file, with its manifest beside it")
    engine.add_argument(
        "--output", type=Path, metavar="FILE.engine", help="the new file (default: beside the ONNX file)"
    )
    engine.add_argument("--skip-check", action="store_true", help="do not compare it with the reference")
    engine.add_argument("--force", action="store_true", help="replace existing files")
    engine.add_argument("--tensorrt", choices=_LIBRARIES, default="auto", help="library that builds it (default auto)")
    _add_engine(engine)

    triton = kinds.add_parser("triton", help="a Triton Inference Server's model repository of an exported ONNX file")
    triton.add_argument("file", type=Path, help="an ONNX file, with its manifest beside it")
    triton.add_argument(
        "--repository", type=Path, required=True, metavar="FOLDER", help="folder of the model repository"
    )
    triton.add_argument("--force", action="store_true", help="replace existing files")

    check = kinds.add_parser("check", help="compare an exported file with the reference again")
    check.add_argument("file", type=Path, help="an ONNX file or an engine, with its manifest beside it")
    check.add_argument(
        "--features",
        type=Path,
        metavar="X.npz",
        help="features to check it with: arrays by input name, of the selection or of the whole graph",
    )


def _add_common(parser: argparse.ArgumentParser, default_preset: str) -> None:
    parser.add_argument("--budget", type=_budget, required=True, help="tokens to keep of an image: 64 or 10%%")
    parser.add_argument(
        "--budget-input", action="store_true", help="make each image's budget an input; --budget is then the largest"
    )
    parser.add_argument(
        "--text-tokens",
        type=_range,
        default=DimRange(1, 32, 256),
        metavar="M",
        help=f"rows of text: {_SIZES} (default 1:32:256)",
    )
    parser.add_argument("--form", choices=FORMS, default="lazy", help="algorithm of the graph (default lazy)")
    parser.add_argument("--preset", choices=PRESETS, help=f"family whose constants are used ({default_preset})")
    parser.add_argument("--tv-temp", type=float, help="temperature of the text-to-vision softmax")
    parser.add_argument("--vv-temp", type=float, help="temperature of the vision-to-vision softmax")
    parser.add_argument("--alpha", type=float, help="weight of covering the image relative to covering the text")
    parser.add_argument("--coverage", choices=get_args(Coverage), help="what the kept tokens cover")
    parser.add_argument("--output", metavar="FILE.onnx", help=f"the new file, or FOLDER/ (default {EXPORT_FOLDER}/)")
    parser.add_argument("--skip-check", action="store_true", help="do not compare it with the reference")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "--tensorrt", nargs="?", const="auto", choices=_LIBRARIES, help="build an engine as well (default auto)"
    )
    _add_engine(parser)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        type=Path,
        action="append",
        default=[],
        metavar="LIB.so",
        help="library of TensorRT plugins that the engine's operators need; repeatable",
    )
    parser.add_argument(
        "--target",
        type=_compute_capability,
        action="append",
        default=[],
        metavar="8.6",
        help="compute capability to build for; repeatable (default: that of this machine's GPU)",
    )


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns a parser whose ValueError becomes the message of a usage error."""

    def wrapped(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return wrapped


_range = _argument(DimRange.parse)
_budget = _argument(Budget.parse)


def _whole_number(text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise ValueError(f"expected a number of at least {minimum}, got {text!r}")
    return int(text)


@_argument
def _count(text: str) -> int:
    return _whole_number(text, 1)


@_argument
def _count_or_zero(text: str) -> int:
    return _whole_number(text, 0)


@_argument
def _named_range(text: str) -> tuple[str, DimRange]:
    name, equals, size = text.partition("=")
    if not equals or not name:
        raise ValueError(f"expected NAME=RANGE, got {text!r}")
    return name, DimRange.parse(size)


@_argument
def _image_size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"an image size is WIDTHxHEIGHT in pixels, such as 336x336, got {text!r}")
    return int(width), int(height)


@_argument
def _compute_capability(text: str) -> str:
    number = text.lower().removeprefix("sm").replace("_", "").replace(".", "")
    if not (number.isdecimal() and 2 <= len(number) <= 3):
        raise ValueError(f"a compute capability is written 8.6 or sm86, got {text!r}")
    return f"{number[:-1]}.{number[-1]}"
