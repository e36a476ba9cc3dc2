"""Builds TensorRT and TensorRT-RTX engines from exported ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines.tensorrt import tensorrt_module
from mmtok_deploy.manifest import ArtifactError, Check, Manifest, TensorInfo
from mmtok_export.artifact import file_infos, now
from mmtok_export.check import check_artifact
from mmtok_export.graph_file import load_graph
from mmtok_export.new_artifact import new_artifact
from mmtok_export.targets import Library, wanted_targets

__all__ = ["EngineBuildError", "build_engine"]


class EngineBuildError(RuntimeError):
    """TensorRT cannot build an engine; the message has the reason."""


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
    if source.is_told_at_run_time:
        raise EngineBuildError(
            f"{onnx_file.name} gets the number of tokens to keep at run time: an engine keeps a fixed number"
        )
    module = tensorrt_module(library)
    for plugin in plugins:
        # The result is None if the library cannot be loaded, or contains no plugins.
        if module.get_plugin_registry().load_library(str(plugin)) is None:
            raise EngineBuildError(
                f"{library} does not load {plugin}: it has no plugins, or lacks a library that it needs (ldd {plugin})"
            )
    with new_artifact(path, force=force) as file:
        file.write_bytes(_serialized(module, onnx_file, source, library, targets))
        manifest = replace(
            source,
            format=library,
            files=file_infos(file),
            details=source.details
            | {"compute_capabilities": wanted_targets(targets), "onnx_sha256": source.files[0].sha256},
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
