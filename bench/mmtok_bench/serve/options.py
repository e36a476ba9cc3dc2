"""`mmtok bench serve` on the command line: its flags, and the sweep that they ask for."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from mmtok_bench.families import Family
from mmtok_bench.serve.presets import PRESETS, ImageKind, PrefixCache, ServedModel, Size, Sweep
from mmtok_deploy.budget import Budget

__all__ = ["add_serve_parser", "sweep_of"]

_T = TypeVar("_T")


def add_serve_parser(benches: Any) -> None:
    """Adds `mmtok bench serve` to the parser of `mmtok bench`."""
    serve = benches.add_parser(
        "serve",
        help="what a served model gains from a budget: latency, throughput, memory, and where it gains nothing",
        description="Starts SGLang servers without the plugin and at every budget, and drives them with SGLang's own "
        "load generator. Whatever is not given comes from the preset.",
    )
    serve.add_argument("--preset", choices=list(PRESETS), help="default: the one that fits this machine")
    model = serve.add_mutually_exclusive_group()
    model.add_argument("--model-path", type=Path, metavar="FOLDER", help="measure this checkpoint; needs --family")
    model.add_argument(
        "--dummy-weights",
        action="store_true",
        help="the preset's models at full size with random weights, without any download (the default)",
    )
    serve.add_argument("--family", choices=get_args(Family), help="of the checkpoint at --model-path")
    serve.add_argument("--models", type=_each(str), metavar="NAMES", help="only these of the preset")
    serve.add_argument("--budgets", type=_each(_budget), help="all,20%%,10%%,5%%,64; all is always among them")
    serve.add_argument("--concurrency", type=_each(_count), help="requests under way at a time: 1,4,16,64")
    serve.add_argument("--image-px", type=_each(_size), help="sizes of images, width x height: 1008x672,448x448")
    serve.add_argument("--image-kinds", type=_each(_one_of(ImageKind)), help="photograph,random")
    serve.add_argument("--prefix-cache", type=_each(_one_of(PrefixCache)), help="off,on")
    serve.add_argument(
        "--num-requests", type=_count, help="of each row and round; never fewer than twice the concurrency"
    )
    serve.add_argument("--output-tokens", type=_count, help="length of every answer")
    serve.add_argument("--rounds", type=_count, help="how often the servers take turns, in alternating order")
    serve.add_argument(
        "--server-args",
        type=shlex.split,
        default=[],
        metavar="'ARGS'",
        help="further arguments of every server, in one word: --server-args='--attention-backend triton'",
    )
    serve.add_argument(
        "--results-dir",
        type=Path,
        default=Path("artifacts/bench/serve"),
        help="for rows, logs and models (default artifacts/bench/serve); no older file is changed",
    )
    serve.add_argument("--dry-run", action="store_true", help="print every command instead of running it")
    serve.add_argument("--json", action="store_true", help="print one JSON object a line instead of the tables")


def sweep_of(arguments: argparse.Namespace, preset: str) -> Sweep:
    """Returns what the flags ask for, on top of a preset.

    Raises:
        ValueError: Flags that do not go together, a model that the preset has not, or a folder without a checkpoint.
    """
    sweep = PRESETS[preset]
    models = _models(arguments, sweep)
    if arguments.image_px:
        models = [replace(model, sizes_px=tuple(arguments.image_px)) for model in models]
    if arguments.budgets:
        budgets = tuple(budget for budget in arguments.budgets if budget != "all")
        models = [replace(model, budgets=budgets) for model in models]
    given = {
        "concurrencies": arguments.concurrency,
        "image_kinds": arguments.image_kinds,
        "prefix_caches": arguments.prefix_cache,
        "num_requests": arguments.num_requests,
        "output_tokens": arguments.output_tokens,
        "rounds": arguments.rounds,
    }
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
    return replace(sweep, models=tuple(models), arguments=(*sweep.arguments, *arguments.server_args), **given)


def _models(arguments: argparse.Namespace, sweep: Sweep) -> list[ServedModel]:
    if arguments.model_path is None:
        if arguments.family is not None:
            raise ValueError("--family is of a checkpoint: give it with --model-path")
        names = arguments.models or [model.name for model in sweep.models]
        known = {model.name: model for model in sweep.models}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"preset {sweep.preset} has {', '.join(known)}; got {unknown[0]!r}")
        return [known[name] for name in names]
    if arguments.models:
        raise ValueError("--models chooses from a preset, --model-path names one checkpoint: give one of them")
    if arguments.family is None:
        raise ValueError(f"--model-path needs --family, one of {', '.join(get_args(Family))}")
    folder: Path = arguments.model_path
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model-path {folder} holds no config.json: expected the folder of a checkpoint")
    like = next(model for model in (*sweep.models, *PRESETS["h200"].models) if model.family == arguments.family)
    return [replace(like, name=folder.resolve().name, model_path=str(folder))]


def _each(parse: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    def parse_list(text: str) -> list[_T]:
        return [parse(part.strip()) for part in text.split(",")]

    return parse_list


def _one_of(choice: Any) -> Callable[[str], str]:
    def parse(text: str) -> str:
        names: Sequence[str] = get_args(choice)
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(names)}, got {text!r}")
        return text

    return parse


def _budget(text: str) -> str:
    try:
        return str(Budget.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _size(text: str) -> Size:
    width, separator, height = text.partition("x")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected width x height in pixels, such as 1008x672, got {text!r}")
    return _count(width), _count(height)
