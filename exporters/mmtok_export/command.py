"""mmtok export: the command line of the exporters."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from rich.console import Console

from mmtok_deploy.budget import Budget
from mmtok_deploy.config import Coverage, KeySource, SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import why_no_file
from mmtok_deploy.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

    from mmtok_deploy.manifest import Manifest
    from mmtok_export.tensorrt import Library

__all__ = ["add_export_parser", "run_export"]

_FOLDER = Path("artifacts/export")
_MAX_SILENT_S = 10
_INTERRUPTED = 130
_LIBRARIES_WITH_ERRORS = ("google", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch")


class _Features(NamedTuple):
    vision_width: int
    keys_width: int
    has_float32_keys: bool = False


# The widths of each family's 7B, 8B, 9B, 30B-A3B or 35B-A3B model. Qwen's keys are float32, since they are means over
# the features that are merged into a token.
_FEATURES = {
    "llava-1.5": _Features(4096, 1024),
    "llava-next": _Features(4096, 1024),
    "internvl3": _Features(3584, 4096),
    "qwen2-vl": _Features(3584, 1280, has_float32_keys=True),
    "qwen2.5-vl": _Features(3584, 1280, has_float32_keys=True),
    "qwen3-vl": _Features(4096, 1152, has_float32_keys=True),
    "qwen3-vl-moe": _Features(2048, 1152, has_float32_keys=True),
    "qwen3.5": _Features(4096, 1152, has_float32_keys=True),
    "qwen3.5-moe": _Features(2048, 1152, has_float32_keys=True),
}

# Also in the modules that use them, whose import would delay --help.
_FORMS = ("lazy", "loop", "unrolled")
_DTYPES = ("float16", "bfloat16", "float32")
_SIZES = "a size, MIN:MAX or MIN:OPTIMUM:MAX"
_UNPRUNED = "add the output unpruned_tokens with all tokens"
_LIBRARIES = ("auto", "tensorrt-rtx", "tensorrt")


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
        "--vision-width", type=int, metavar="D", help="width of vision tokens (default: that of the preset's 7B model)"
    )
    selection.add_argument(
        "--keys-width",
        type=int,
        metavar="d",
        help="width of features before the projector (default: that of the preset's 7B model)",
    )
    selection.add_argument(
        "--keys",
        choices=get_args(KeySource),
        default="input",
        help="--mmtok-keys of the server: output compares the vision tokens themselves (default input)",
    )
    selection.add_argument(
        "--dtype", choices=_DTYPES, default="float16", help="dtype of the features (default float16)"
    )
    selection.add_argument(
        "--keys-dtype",
        choices=_DTYPES,
        help="dtype of the features before the projector (default: float32 for a Qwen, else --dtype)",
    )
    _add_common(selection, "default llava-1.5")

    encoder = kinds.add_parser("encoder", help="a vision encoder with the selection: pixels in, kept tokens out")
    encoder.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint folder")
    size = encoder.add_mutually_exclusive_group()
    size.add_argument(
        "--image-size",
        type=_image_size,
        metavar="WxH",
        help="size of an image in pixels; only a Qwen supports several sizes",
    )
    size.add_argument(
        "--tokens",
        type=_range,
        metavar="N",
        help=f"tokens of an image, for a Qwen of any size or an InternVL3 of any number of tiles: {_SIZES}",
    )
    encoder.add_argument("--dtype", choices=_DTYPES, default="float16", help="dtype of the encoder (default float16)")
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
        type=int,
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
        type=int,
        default=1,
        metavar="G",
        help="number of consecutive features that are merged into a token (default 1)",
    )
    attach.add_argument("--keys-index", metavar="TENSOR", help="index of the merged feature of each token")
    attach.add_argument(
        "--tokens", type=_range, metavar="N", help=f"tokens of an image, if this is dynamic in the graph: {_SIZES}"
    )
    attach.add_argument("--grid-width", type=int, help="tokens in a row of an image; adds the output `positions`")
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


def run_export(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok export`: 0 ok, 1 a check or a build failed, 2 usage, 130 Ctrl-C."""
    # SIGTERM exits normally, so that incomplete files are removed.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with Console(stderr=True).status("Starting") as status:
            return _run(arguments, lambda step: status.update(step[:1].upper() + step[1:]))
    except KeyboardInterrupt:
        return _fail("interrupted; no incomplete file is left", _INTERRUPTED)
    except OSError as error:
        hint = ": free some space, or choose another --output" if error.errno in (errno.ENOSPC, errno.EFBIG) else ""
        return _fail(f"{error}{hint}", 2)
    except ModuleNotFoundError:
        raise  # the command line names the missing package
    except ValueError as error:
        return _fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        return _fail(_library_error(error), 2)
    except Exception as error:
        # Libraries whose errors have no common class.
        if type(error).__module__.partition(".")[0] not in _LIBRARIES_WITH_ERRORS:
            raise
        return _fail(_library_error(error), 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_inputs(arguments: argparse.Namespace) -> None:
    """Raises ValueError if a file to read or a checkpoint is missing; the libraries take seconds to import."""
    for name in ("file", "onnx"):
        path = getattr(arguments, name, None)
        if path is not None and (obstacle := why_no_file(path)):
            raise ValueError(obstacle)
    model = getattr(arguments, "model", None)
    if model is not None and not (Path(model) / "config.json").is_file():
        raise ValueError(f"expected a Hugging Face checkpoint directory, and {model} has no config.json")


def _run(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> int:
    _check_inputs(arguments)
    from mmtok_deploy.engines import EngineError
    from mmtok_export.picks import CheckFailedError
    from mmtok_export.tensorrt import EngineBuildError

    runs = {"selection": _selection, "encoder": _encoder, "attach": _attach}
    runs |= {"engine": _engine, "triton": _triton, "check": _check}
    try:
        runs[arguments.kind](arguments, on_step)
    except (CheckFailedError, EngineBuildError, EngineError) as error:
        return _fail(str(error), 1)
    return 0


def _library_error(error: BaseException) -> str:
    """Returns a library's error message in one line, with a remedy if one is known."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "allocate" in said or "out of memory" in said.lower():
        return f"out of memory ({said:.200}): export for fewer tokens or smaller images, or on a larger machine"
    if type(error).__module__.startswith(("google", "onnx.")):
        return f"protobuf refuses it ({said:.200}): a graph has at most 2 GiB; keep its weights in a file beside it"
    return f"{type(error).__module__}.{type(error).__name__}: {said:.400}"


def _selection(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_export.artifact import export_model
    from mmtok_export.budget import num_kept, share_of
    from mmtok_export.selection_graph import SelectionSpec, build_selection

    features = _FEATURES[arguments.preset or "llava-1.5"]
    vision_width = features.vision_width if arguments.vision_width is None else arguments.vision_width
    if arguments.keys == "output":
        features = _Features(vision_width, vision_width)
        if arguments.keys_width not in (None, vision_width) or arguments.keys_dtype not in (None, arguments.dtype):
            raise ValueError("--keys output compares the vision tokens themselves: drop --keys-width and --keys-dtype")
    spec = SelectionSpec(
        budget=num_kept(arguments.budget, arguments.tokens),
        num_tokens=arguments.tokens,
        num_words=arguments.text_tokens,
        batch=arguments.batch,
        vision_width=vision_width,
        keys_width=features.keys_width if arguments.keys_width is None else arguments.keys_width,
        dtype=arguments.dtype,
        keys_dtype=arguments.keys_dtype or ("float32" if features.has_float32_keys else arguments.dtype),
        config=_config(arguments, "llava-1.5"),
        form=arguments.form,
        takes_budget=arguments.budget_input,
        share=share_of(arguments.budget, arguments.tokens, is_input=arguments.budget_input),
    )
    name = f"selection-{arguments.preset or 'llava-1.5'}-n{_in_name(spec.num_tokens)}-k{spec.budget}.onnx"
    path = _output(arguments, name)
    engine = _planned_engine(path, spec.budget, arguments, is_told=spec.is_told_at_run_time)
    on_step("building the graph")
    model = build_selection(spec)
    details = {"preset": arguments.preset or "llava-1.5", "keys": arguments.keys}
    manifest = export_model(model, path, "selection", spec, details=details, **_how(arguments, on_step))
    _report(path, manifest, has_next=True)
    _build_engine(path, engine, arguments, on_step)


def _encoder(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_export.artifact import export_model
    from mmtok_export.encoder import build_joined_encoder, num_kept_of, takes_grid
    from mmtok_export.encoders import family_of

    image_size = arguments.image_size or arguments.tokens
    budget, share = num_kept_of(
        arguments.model, image_size, arguments.budget, batch=arguments.batch_size, is_input=arguments.budget_input
    )
    name = f"encoder-{arguments.model.resolve().name}-k{budget}.onnx"
    path = _output(arguments, name)
    is_told = arguments.budget_input or share is not None
    if arguments.tensorrt and takes_grid(arguments.model, image_size):
        raise ValueError("an engine with an encoder takes images of one size: name --image-size in place of --tokens")
    engine = _planned_engine(path, budget, arguments, is_told=is_told)
    on_step(f"exporting the encoder of {arguments.model}")
    joined = build_joined_encoder(
        arguments.model,
        image_size,
        budget,
        takes_budget=arguments.budget_input,
        share=share,
        is_unpruned_given=arguments.unpruned,
        num_words=arguments.text_tokens,
        dtype=arguments.dtype,
        form=arguments.form,
        batch=arguments.batch_size,
        config=_config(arguments, family_of(arguments.model)),
        random_weights=arguments.random_weights,
    )
    manifest = export_model(
        joined.model,
        path,
        "encoder",
        joined.spec,
        details=joined.details,
        dimensions=joined.dimensions,
        encoder=joined.encoder,
        **_how(arguments, on_step),
    )
    _report(path, manifest, has_next=True)
    _build_engine(path, engine, arguments, on_step)


def _attach(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_export.artifact import export_model
    from mmtok_export.attach import Attachment, attach_selection
    from mmtok_export.foreign_graph import open_dimensions

    attachment = Attachment(
        vision=arguments.vision,
        keys=arguments.keys,
        keys_per_token=arguments.keys_per_token,
        keys_index=arguments.keys_index,
        budget=arguments.budget,
        num_tokens=arguments.tokens,
        num_words=arguments.text_tokens,
        config=_config(arguments, None),
        form=arguments.form,
        grid_width=arguments.grid_width,
        takes_budget=arguments.budget_input,
        is_unpruned_given=arguments.unpruned,
        batch=arguments.batch,
        skip_tokens=arguments.skip_tokens,
        map_layout=arguments.map,
        dimensions=dict(arguments.dim),
    )
    on_step(f"reading {arguments.onnx}")
    attached = attach_selection(arguments.onnx, attachment)
    model, spec = attached.model, attached.spec
    path = _output(arguments, f"{arguments.onnx.stem}-k{spec.budget}.onnx")
    engine = _planned_engine(path, spec.budget, arguments, is_told=spec.is_told_at_run_time)
    _check_dimensions(open_dimensions(model), attached.dimensions, has_engine=engine is not None)
    manifest = export_model(
        model,
        path,
        "attached",
        spec,
        details=attached.details | {"preset": arguments.preset},
        dimensions=attached.dimensions,
        source=arguments.onnx,
        encoder=attached.encoder,
        **_how(arguments, on_step),
    )
    _report(path, manifest, has_next=True)
    if held := attached.details["one_image"]:
        _note(
            f"{', '.join(held)} tells one image: a run of several is refused, for their tokens follow one another and "
            "would share one budget; run the file once an image"
        )
    _build_engine(path, engine, arguments, on_step)


def _check(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_deploy.manifest import ArtifactError, Manifest
    from mmtok_export.check import CheckFailedError, check_artifact, estimated_seconds

    on_step(f"reading {arguments.file}")
    try:
        manifest = Manifest.load(arguments.file)
    except ArtifactError as error:
        raise ArtifactError(f"{error}{_what_it_says_of_itself(arguments.file)}") from error
    features = None if arguments.features is None else _load_features(arguments.features)
    if features is None and (seconds := estimated_seconds(manifest)) > _MAX_SILENT_S:
        _note(f"it takes about {seconds:.0f} s on this machine")
    check = check_artifact(
        arguments.file, manifest, features=features, on_case=lambda case: on_step(f"checking {case}")
    )
    _report(arguments.file, replace(manifest, check=check))
    if check.status == "not run":
        raise CheckFailedError(f"{arguments.file} was not checked: {check.detail}")


def _what_it_says_of_itself(file: Path) -> str:
    """Returns a sentence with the name and constants that an ONNX file was exported with; empty if it has none."""
    import onnx_ir as ir

    try:
        said = ir.load(file).metadata_props
    except Exception:  # no ONNX file: the caller's error says so
        return ""
    if "mmtok.file" not in said:
        return ""
    names = ("budget", "form", "preset", "constants")
    known = ", ".join(f"{name} {said[f'mmtok.{name}']}" for name in names if said.get(f"mmtok.{name}"))
    return f". The graph says that it was exported as {said['mmtok.file']}: {known}"


def _engine(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_deploy.manifest import Manifest

    on_step(f"reading {arguments.file}")
    engine = _engine_of(arguments.file, Manifest.load(arguments.file).budget, arguments, path=arguments.output)
    _build_engine(arguments.file, engine, arguments, on_step)


def _triton(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_export.next_steps import write_triton_repository

    on_step(f"copying {arguments.file}")
    print(write_triton_repository(arguments.file, arguments.repository, force=arguments.force))


def _load_features(path: Path) -> dict[str, Tensor]:
    import numpy as np
    import torch

    from mmtok_deploy.manifest import why_no_file

    if obstacle := why_no_file(path):
        raise FileNotFoundError(obstacle)
    try:
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # zipfile's, numpy's and pickle's have no common class
        raise ValueError(f"{path} is no .npz with an array for each input: {error}") from error


def _output(arguments: argparse.Namespace, name: str) -> Path:
    """Returns the path to write: --output, or a file of this name in a folder."""
    if arguments.output is None:
        return _FOLDER / name
    is_folder = arguments.output.endswith(("/", os.sep)) or Path(arguments.output).is_dir()
    return Path(arguments.output) / name if is_folder else Path(arguments.output)


def _how(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> dict[str, Any]:
    return {
        "has_check": not arguments.skip_check,
        "force": arguments.force,
        "on_step": on_step,
        "on_note": _note,
    }


def _note(text: str) -> None:
    print(f"mmtok export: {text}", file=sys.stderr, flush=True)


def _planned_engine(
    onnx_file: Path, budget: int, arguments: argparse.Namespace, *, is_told: bool
) -> tuple[Path, Library] | None:
    """Returns the engine's path and the library that builds it; None without an engine. Wrong arguments raise here."""
    from mmtok_export.artifact import check_output

    check_output(onnx_file, force=arguments.force)
    if arguments.tensorrt is None:
        if arguments.target:
            raise ValueError("--target is for an engine: add --tensorrt")
        if arguments.plugin:
            raise ValueError("--plugin is for an engine: add --tensorrt")
        return None
    if is_told:
        raise ValueError("an engine makes a fixed number of picks: name a --budget of tokens without --budget-input")
    return _engine_of(onnx_file, budget, arguments)


def _engine_of(
    onnx_file: Path, budget: int, arguments: argparse.Namespace, *, path: Path | None = None
) -> tuple[Path, Library]:
    """Returns the engine's path and the library that builds it."""
    from mmtok_deploy.engines.tensorrt import tensorrt_module
    from mmtok_export.artifact import check_output
    from mmtok_export.tensorrt import check_targets, choose_library, engine_path

    library: Library = choose_library(arguments.target) if arguments.tensorrt == "auto" else arguments.tensorrt
    check_targets(library, arguments.target, budget)
    missing = [plugin for plugin in arguments.plugin if not plugin.is_file()]
    if missing:
        raise ValueError(f"--plugin {missing[0]} does not exist")
    tensorrt_module(library)
    path = path or engine_path(onnx_file, library, arguments.target)
    check_output(path, force=arguments.force)
    return path, library


def _check_dimensions(open_sizes: set[str], ranges: dict[str, DimRange], *, has_engine: bool) -> None:
    from mmtok_export.foreign_graph import unknown_dimension

    unknown = sorted(set(ranges) - open_sizes)
    if unknown:
        raise unknown_dimension(unknown[0], open_sizes)
    missing = sorted(open_sizes - set(ranges))
    if missing and has_engine:
        raise ValueError(f"an engine needs the range of every open size: add --dim {missing[0]}=MIN:MAX")


def _build_engine(
    onnx_file: Path,
    engine: tuple[Path, Library] | None,
    arguments: argparse.Namespace,
    on_step: Callable[[str], None],
) -> None:
    from mmtok_export.tensorrt import build_engine

    if engine is None:
        return
    path, library = engine
    on_step(f"building {path.name}")
    manifest = build_engine(
        onnx_file,
        path,
        library,
        arguments.target,
        plugins=arguments.plugin,
        has_check=not arguments.skip_check,
        force=arguments.force,
    )
    _report(path, manifest)


def _report(path: Path, manifest: Manifest, *, has_next: bool = False) -> None:
    size_bytes = sum(file.size_bytes for file in manifest.files)
    size = f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"
    sizes = ", ".join(f"{name} {allowed}" for name, allowed in manifest.dimensions.items())
    kept = manifest.share or f"{'up to ' if manifest.takes_budget else ''}{manifest.budget} tokens"
    if any(tensor.name == "tile_grid" for tensor in manifest.inputs):
        kept += " of each tile"
    print(f"{path}  {size}, keeps {kept}, {manifest.form}; {sizes}")
    runtime = f" ({manifest.check.runtime})" if manifest.check.runtime else ""
    print(f"  check {manifest.check.status}: {manifest.check.detail}{runtime}", flush=True)
    if has_next:
        from mmtok_export.next_steps import next_steps

        for consumer, step in next_steps(path, manifest).items():
            print(f"  next, {consumer}: {step}", flush=True)


def _fail(message: str, code: int) -> int:
    print(f"mmtok export: {message}", file=sys.stderr)
    return code


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
    parser.add_argument("--form", choices=_FORMS, default="lazy", help="algorithm of the graph (default lazy)")
    parser.add_argument("--preset", choices=PRESETS, help=f"family whose constants are used ({default_preset})")
    parser.add_argument("--tv-temp", type=float, help="temperature of the text-to-vision softmax")
    parser.add_argument("--vv-temp", type=float, help="temperature of the vision-to-vision softmax")
    parser.add_argument("--alpha", type=float, help="weight of covering the image relative to covering the text")
    parser.add_argument("--coverage", choices=get_args(Coverage), help="what the kept tokens cover")
    parser.add_argument("--output", metavar="FILE.onnx", help=f"the new file, or FOLDER/ (default {_FOLDER}/)")
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


def _config(arguments: argparse.Namespace, family: str | None) -> SelectionConfig:
    """Returns the constants of the flags; constants that are not given are those of the preset or the family."""
    named = arguments.preset or family
    if named is None and None in (arguments.tv_temp, arguments.vv_temp, arguments.alpha):
        raise ValueError(
            f"the file does not say which constants its encoder needs: name a --preset ({', '.join(PRESETS)}), or "
            "give --tv-temp, --vv-temp and --alpha"
        )
    given = {name: getattr(arguments, name) for name in ("tv_temp", "vv_temp", "alpha", "coverage")}
    preset = PRESETS[named].config if named else SelectionConfig()
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def _in_name(size: DimRange) -> str:
    return str(size.minimum) if size.is_fixed else f"{size.minimum}-{size.maximum}"


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
