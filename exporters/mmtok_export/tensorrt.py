"""Builds TensorRT and TensorRT-RTX engines from exported ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines.tensorrt import compute_capability, tensorrt_module
from mmtok_deploy.manifest import ArtifactError, Check, Manifest, TensorInfo
from mmtok_export.artifact import file_infos, new_artifact, now
from mmtok_export.check import check_artifact
from mmtok_export.graph_file import load_graph

__all__ = [
    "EngineBuildError",
    "Library",
    "RTX_TARGETS",
    "build_engine",
    "check_targets",
    "choose_library",
    "engine_path",
]

RTX_TARGETS = frozenset({"8.0", "8.6", "8.9", "12.0", "12.1"})
"""Compute capabilities for which TensorRT-RTX 1.7 builds a selection: not Hopper, nor datacenter Blackwell."""

# TensorRT-RTX 1.7 lists it, but cannot build float32 matrix products for it ("FP32 GEMM is not supported"), which every
# selection needs.
_WITHOUT_FLOAT32 = "7.5"

# Their TensorRT comes with JetPack; PyPI has no package of it.
_JETSONS = {"8.7": "Orin", "11.0": "Thor"}

Library = Literal["tensorrt", "tensorrt-rtx"]

_MAX_BUDGET = 3840


class EngineBuildError(RuntimeError):
    """TensorRT cannot build an engine; the message has the reason."""


def choose_library(targets: list[str]) -> Library:
    """Returns the library that can build for these compute capabilities on this machine.

    TensorRT-RTX builds for any of its targets, with or without a GPU. TensorRT builds only for this machine's GPU.

    Args:
        targets: Compute capabilities ("8.6"); empty for this machine's GPU.

    Raises:
        ValueError: Neither library can; the message says what to install.
    """
    wanted = _wanted(targets)
    if set(wanted) <= RTX_TARGETS:
        return "tensorrt-rtx"
    if wanted == [_at_hand()]:
        return "tensorrt"
    raise _no_engine_for(wanted)


def check_targets(library: Library, targets: list[str], budget: int) -> None:
    """Raises ValueError if the library cannot build for these compute capabilities here, or for such a budget."""
    wanted = _wanted(targets)
    if library == "tensorrt-rtx" and not set(wanted) <= RTX_TARGETS:
        raise _no_engine_for(wanted)
    if library == "tensorrt" and wanted != [_at_hand()]:
        raise ValueError(f"TensorRT builds for the GPU at hand alone, not for {', '.join(wanted)}: leave --target out")
    if budget > _MAX_BUDGET:
        raise ValueError(f"TensorRT keeps at most {_MAX_BUDGET} tokens (its TopK), got a budget of {budget}")


def _no_engine_for(wanted: list[str]) -> ValueError:
    others = ", ".join(target for target in wanted if target not in RTX_TARGETS)
    reason = f" (for {_WITHOUT_FLOAT32} it multiplies no float32 matrices)" if _WITHOUT_FLOAT32 in wanted else ""
    no_engine = (
        f"TensorRT-RTX has no engines for compute capability {others}{reason}, and TensorRT builds on the GPU itself"
    )
    jetsons = [_JETSONS[target] for target in wanted if target in _JETSONS]
    if jetsons:
        return ValueError(
            f"{no_engine}: export without --tensorrt, copy the file to the Jetson {jetsons[0]}, and run there the "
            "trtexec command that the export prints"
        )
    return ValueError(
        f"{no_engine}: on a machine with that GPU, pip install 'mmtok-deploy[tensorrt]' and export again there, or "
        "mmtok export engine FILE.onnx; or run the ONNX file by ONNX Runtime's CUDA provider"
    )


def engine_path(onnx_file: Path, library: Library, targets: list[str]) -> Path:
    """Returns the path of an ONNX file's engine, such as `NAME.sm86.rtx.engine` or `NAME.sm90.engine`."""
    capabilities = "-".join(f"sm{target.replace('.', '')}" for target in _wanted(targets))
    return onnx_file.with_name(f"{onnx_file.stem}.{capabilities}{'.rtx' if library == 'tensorrt-rtx' else ''}.engine")


def build_engine(
    onnx_file: Path,
    path: Path,
    library: Library,
    targets: list[str],
    *,
    plugins: Sequence[Path] = (),
    has_check: bool = True,
    force: bool = False,
) -> Manifest:
    """Builds an engine from an exported ONNX file, writes it, and returns its manifest.

    The engine is strongly typed and does not use TF32, so float32 stays float32. Its optimization profile has the
    manifest's ranges.

    Args:
        onnx_file: The file, with its manifest.
        path: Path of the engine.
        library: The library that builds it.
        targets: Compute capabilities ("8.6"); empty for this machine's GPU.
        plugins: Libraries of TensorRT plugins that its operators need.
        has_check: Whether the engine is checked, if its GPU is present.
        force: Whether existing files may be replaced.

    Raises:
        ArtifactError: The ONNX file has changed since its export.
        EngineBuildError: TensorRT cannot build the engine; the message has TensorRT's errors.
        EngineError: The library is not installed.
        CheckFailedError: The engine ran on this machine's GPU, and its selection differs from the reference's.
    """
    source = Manifest.load(onnx_file)
    load_graph(onnx_file, source)
    if source.takes_budget or source.share:
        raise EngineBuildError(
            f"{onnx_file.name} gets the number of tokens to keep at run time: an engine keeps a fixed number"
        )
    module = tensorrt_module(library)
    for plugin in plugins:
        # The result is None if the library cannot be loaded, or contains no plugins.
        if module.get_plugin_registry().load_library(str(plugin)) is None:
            raise EngineBuildError(f"{library} does not load {plugin}: its messages are above")
    with new_artifact(path, force=force) as file:
        file.write_bytes(_serialized(module, onnx_file, source, library, targets))
        manifest = replace(
            source,
            format=library,
            files=file_infos(file),
            details=source.details | {"compute_capabilities": _wanted(targets), "onnx_sha256": source.files[0].sha256},
            versions=source.versions | {library: module.__version__},
            requires={library: module.__version__},
            created=now(),
            check=Check("not run", "", "--skip-check"),
        )
        Manifest.path_of(file).write_text(manifest.to_json(), encoding="utf-8")
        if has_check:
            manifest = replace(manifest, check=check_artifact(file, manifest))
        Manifest.path_of(file).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _wanted(targets: list[str]) -> list[str]:
    at_hand = _at_hand()
    if targets or at_hand:
        return targets or [str(at_hand)]
    raise ValueError("there is no NVIDIA GPU here to build for: name one, such as --target 8.6 (RTX A6000)")


def _at_hand() -> str | None:
    return compute_capability() if torch.cuda.is_available() else None


def _serialized(module: Any, onnx_file: Path, source: Manifest, library: Library, targets: list[str]) -> bytes:
    log = _Log(module)
    builder = module.Builder(log.logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, log.logger)
    # Parsed by path, so that TensorRT finds weights in a file beside it.
    if not parser.parse_from_file(str(onnx_file)):
        errors = "; ".join(str(parser.get_error(idx)) for idx in range(parser.num_errors))
        raise EngineBuildError(f"{library} does not read {onnx_file.name}: {errors}")
    config = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)
    if library == "tensorrt-rtx" and targets:
        config.num_compute_capabilities = len(targets)
        for idx, target in enumerate(targets):
            capability = getattr(module.ComputeCapability, f"SM{target.replace('.', '')}")
            config.set_compute_capability(capability, idx)
    profile = builder.create_optimization_profile()
    for tensor in source.inputs:
        if any(isinstance(size, str) for size in tensor.shape):
            shapes = [_sizes(tensor, source.dimensions, which) for which in ("minimum", "optimum", "maximum")]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineBuildError(f"{library} does not build {onnx_file.name}: {log.text()}")
    return bytes(engine)


def _sizes(tensor: TensorInfo, dimensions: dict[str, DimRange], which: str) -> list[int]:
    unknown = [size for size in tensor.shape if isinstance(size, str) and size not in dimensions]
    if unknown:
        name = unknown[0]
        raise ArtifactError(f"input {tensor.name} has the size {name}: give its range, --dim {name}=MIN:MAX")
    return [size if isinstance(size, int) else getattr(dimensions[size], which) for size in tensor.shape]


class _Log:
    """Collects TensorRT's errors for an exception instead of printing them."""

    def __init__(self, module: Any) -> None:
        messages: list[str] = []

        class Logger(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                    messages.append(message)

        self.logger = Logger()
        self._messages = messages

    def text(self) -> str:
        return "; ".join(self._messages) or "it gives no reason"
