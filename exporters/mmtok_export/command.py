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
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.manifest import ArtifactError, Manifest, why_no_file
from mmtok_deploy.presets import PRESETS
from mmtok_export.arguments import EXPORT_FOLDER
from mmtok_export.checkpoint_config import check_sizes, family_of
from mmtok_export.new_artifact import check_output
from mmtok_export.spec import SelectionSpec, num_kept, share_of
from mmtok_export.targets import Library, check_targets, choose_library, engine_path

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["run_export"]

_MAX_SILENT_S = 10
_INTERRUPTED = 130
_LIBRARIES_WITH_ERRORS = ("google", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch")


class _Features(NamedTuple):
    vision_width: int
    keys_width: int
    has_float32_keys: bool = False


# The widths of each family's 7B, 8B, 9B, 30B-A3B or 35B-A3B model, for GLM-4.5V of its only one. Keys of a Qwen and a
# GLM are float32, since they are means over the features that are merged into a token.
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
    "glm-4.1v": _Features(4096, 1536, has_float32_keys=True),
    "glm-4.5v": _Features(4096, 1536, has_float32_keys=True),
}


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
    except ImportError as error:
        said = " ".join(str(error).split())
        if "shared object" not in said:
            raise
        return _fail(f"a library cannot be loaded, often for lack of memory (ulimit -v): {said:.300}", 2)
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


def _run(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> int:
    # Before the libraries are imported, which takes seconds.
    _check_inputs(arguments)
    _check_options(arguments)
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


def _check_inputs(arguments: argparse.Namespace) -> None:
    """Raises ValueError if a file to read or its manifest is missing."""
    for name in ("file", "onnx", "features"):
        path = getattr(arguments, name, None)
        if path is not None and (obstacle := why_no_file(path)):
            raise ValueError(obstacle)
    if "file" in arguments:
        try:
            Manifest.read(arguments.file)
        except ArtifactError as error:
            raise ArtifactError(f"{error}{_what_it_says_of_itself(arguments.file)}") from error


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit together, and OSError for an --output that cannot be written."""
    if arguments.kind == "encoder":
        check_sizes(arguments.model, arguments.image_size, is_any_size=arguments.tokens is not None)
    if arguments.kind in ("selection", "encoder", "attach"):
        spec = _selection_spec(arguments) if arguments.kind == "selection" else _spec_of_any_encoder(arguments)
        if arguments.kind == "selection":
            check_output(_output(arguments, _selection_name(arguments, spec)), force=arguments.force)
        elif arguments.output is not None:
            # The name that a file gets in a folder depends on the encoder.
            check_output(_output(arguments, "any.onnx"), force=arguments.force)
        _library(arguments, spec.budget, is_told=spec.is_told_at_run_time)
    elif arguments.kind == "engine":
        manifest = Manifest.read(arguments.file)
        _library(arguments, manifest.budget, is_told=manifest.is_told_at_run_time)


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
    from mmtok_export.selection_graph import build_selection

    spec = _selection_spec(arguments)
    path = _output(arguments, _selection_name(arguments, spec))
    engine = _planned_engine(path, spec.budget, arguments, is_told=spec.is_told_at_run_time)
    on_step("building the graph")
    model = build_selection(spec)
    details = {"preset": arguments.preset or "llava-1.5", "keys": arguments.keys}
    manifest = export_model(model, path, "selection", spec, details=details, **_how(arguments, on_step))
    _report(path, manifest, has_next=True)
    _build_engine(path, engine, arguments, on_step)


def _selection_name(arguments: argparse.Namespace, spec: SelectionSpec) -> str:
    num_tokens = spec.num_tokens
    tokens = str(num_tokens.minimum) if num_tokens.is_fixed else f"{num_tokens.minimum}-{num_tokens.maximum}"
    return f"selection-{arguments.preset or 'llava-1.5'}-n{tokens}-k{spec.budget}.onnx"


def _selection_spec(arguments: argparse.Namespace) -> SelectionSpec:
    features = _FEATURES[arguments.preset or "llava-1.5"]
    vision_width = features.vision_width if arguments.vision_width is None else arguments.vision_width
    if arguments.keys == "output":
        features = _Features(vision_width, vision_width)
        if arguments.keys_width not in (None, vision_width) or arguments.keys_dtype not in (None, arguments.dtype):
            raise ValueError("--keys output compares the vision tokens themselves: drop --keys-width and --keys-dtype")
    return SelectionSpec(
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


def _spec_of_any_encoder(arguments: argparse.Namespace) -> SelectionSpec:
    """Returns a selection with these options and made-up sizes in place of the encoder's; wrong options raise here."""
    num_tokens = arguments.tokens or DimRange.fixed(arguments.budget.tokens or 1)
    return SelectionSpec(
        budget=num_kept(arguments.budget, num_tokens),
        num_tokens=num_tokens,
        num_words=arguments.text_tokens,
        batch=DimRange.fixed(1),
        vision_width=1,
        keys_width=1,
        dtype="float32",
        keys_dtype="float32",
        # An encoder of this project says which family it is.
        config=_config(arguments, None if arguments.kind == "attach" else "llava-1.5"),
        form=arguments.form,
        takes_budget=arguments.budget_input,
        share=share_of(arguments.budget, num_tokens, is_input=arguments.budget_input),
    )


def _encoder(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_export.artifact import export_model
    from mmtok_export.encoder import build_joined_encoder, num_kept_of, takes_grid

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
    from mmtok_export.attach import Attachment, KeysNotNamedError, attach_selection
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
    try:
        attached = attach_selection(arguments.onnx, attachment)
    except KeysNotNamedError as error:
        raise ValueError(error.text(["mmtok", *_without_keys(arguments.given)])) from error
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


def _without_keys(given: list[str]) -> list[str]:
    """Returns the arguments of `mmtok` without those that name the keys."""
    replaced = ("--keys", "--keys-per-token", "--keys-index")
    return [
        each
        for before, each in zip(["", *given], given, strict=False)
        if each.partition("=")[0] not in replaced and before not in replaced
    ]


def _check(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_export.check import CheckFailedError, check_artifact, estimated_seconds

    on_step(f"reading {arguments.file}")
    manifest = Manifest.load(arguments.file)
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
        return ". The graph was not exported by mmtok; `mmtok export attach` adds a selection to an encoder"
    names = ("budget", "form", "preset", "constants")
    known = ", ".join(f"{name} {said[f'mmtok.{name}']}" for name in names if said.get(f"mmtok.{name}"))
    return f". The graph says that it was exported as {said['mmtok.file']}: {known}"


def _engine(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    on_step(f"reading {arguments.file}")
    manifest = Manifest.load(arguments.file)
    library = _library(arguments, manifest.budget, is_told=manifest.is_told_at_run_time)
    assert library is not None
    engine = _engine_of(arguments.file, library, arguments, path=arguments.output)
    _build_engine(arguments.file, engine, arguments, on_step)


def _triton(arguments: argparse.Namespace, on_step: Callable[[str], None]) -> None:
    from mmtok_export.next_steps import write_triton_repository

    on_step(f"copying {arguments.file}")
    print(write_triton_repository(arguments.file, arguments.repository, force=arguments.force))


def _load_features(path: Path) -> dict[str, Tensor]:
    import numpy as np
    import torch

    try:
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # zipfile's, numpy's and pickle's have no common class
        raise ValueError(f"{path} is no .npz with an array for each input: {error}") from error


def _output(arguments: argparse.Namespace, name: str) -> Path:
    """Returns the path to write: --output, or a file of this name in a folder.

    Raises:
        ValueError: --output is no name of an ONNX file.
    """
    if arguments.output is None:
        return EXPORT_FOLDER / name
    path = Path(arguments.output)
    if arguments.output.endswith(("/", os.sep)) or path.is_dir():
        return path / name
    if path.suffix != ".onnx":  # ONNX chooses a file's format by its suffix
        raise ValueError(f"--output is a file that ends with .onnx, or a folder that ends with /, got {path}")
    return path


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
    check_output(onnx_file, force=arguments.force)
    library = _library(arguments, budget, is_told=is_told)
    return None if library is None else _engine_of(onnx_file, library, arguments)


def _library(arguments: argparse.Namespace, budget: int, *, is_told: bool) -> Library | None:
    """Returns the library that builds the engine; None without an engine.

    Raises:
        ValueError: No library can build it here, or options do not fit together.
    """
    if arguments.tensorrt is None:
        if arguments.target:
            raise ValueError("--target is for an engine: add --tensorrt")
        if arguments.plugin:
            raise ValueError("--plugin is for an engine: add --tensorrt")
        return None
    if is_told:
        raise ValueError("an engine makes a fixed number of picks: name a --budget of tokens without --budget-input")
    library: Library = choose_library(arguments.target) if arguments.tensorrt == "auto" else arguments.tensorrt
    check_targets(library, arguments.target, budget)
    missing = [plugin for plugin in arguments.plugin if not plugin.is_file()]
    if missing:
        raise ValueError(f"--plugin {missing[0]} does not exist")
    return library


def _engine_of(
    onnx_file: Path, library: Library, arguments: argparse.Namespace, *, path: Path | None = None
) -> tuple[Path, Library]:
    """Returns the engine's path and the library that builds it."""
    from mmtok_deploy.engines.tensorrt import tensorrt_module

    path = path or engine_path(onnx_file, library, arguments.target)
    check_output(path, force=arguments.force)
    tensorrt_module(library)
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
