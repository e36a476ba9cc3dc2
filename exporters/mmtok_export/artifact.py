"""Writes a model with a selection as a checked ONNX file with its manifest."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from mmtok_deploy import __version__
from mmtok_deploy.budget import Budget
from mmtok_deploy.dim_range import DimRange
from mmtok_deploy.engines.onnxruntime import VERSION
from mmtok_deploy.manifest import Check, FileInfo, Kind, Manifest, describe_file
from mmtok_export.check import check_artifact, estimated_seconds
from mmtok_export.graph_file import tensor_infos
from mmtok_export.new_artifact import PROCESSOR_SUFFIX, WEIGHTS_SUFFIX, files_of, new_artifact
from mmtok_export.pixels import processor_config
from mmtok_export.spec import SelectionSpec
from mmtok_export.whole_graph import Encoder

__all__ = ["export_model", "file_infos", "now"]

# A protobuf message has at most 2 GiB, and loading a large one takes memory of twice its size.
_MAX_INLINE_BYTES = 256 * 2**20
_ONNX_DOMAINS = ("", "ai.onnx")
# The oldest version that was tested, with the highest opset and format version that it reads.
_OLDEST_ONNX_RUNTIME, _TRIED_OPSET, _TRIED_IR_VERSION = "1.18", 21, 10
_SECONDS_WITHOUT_A_WORD = 10


def export_model(
    model: ir.Model,
    path: Path,
    kind: Kind,
    spec: SelectionSpec,
    *,
    details: Mapping[str, Any] | None = None,
    dimensions: Mapping[str, DimRange] | None = None,
    source: Path | None = None,
    encoder: Encoder | None = None,
    has_check: bool = True,
    force: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Writes a model with a selection as an ONNX file, compares it with the reference, and returns its manifest.

    Args:
        model: The model.
        path: Path of the file.
        kind: The manifest's kind.
        spec: The selection's sizes and constants.
        details: Further entries of the manifest.
        dimensions: Ranges of further dynamic dimensions.
        source: The file that the model was read from; neither it nor its weights are overwritten.
        encoder: Runs the original encoder; the check compares the model's features with its features.
        has_check: Whether the file is compared with the reference.
        force: Whether existing files may be replaced.
        on_step: Called with a description of the next step.
        on_note: Called with a message for the user.

    Raises:
        FileExistsError: The file exists and may not be replaced.
        OSError: The file could not be written.
        CheckFailedError: The graph's selection differs from the reference's.
    """
    _check_source(path, model, source)
    manifest = Manifest(
        kind=kind,
        format="onnx",
        files=(FileInfo(path.name, 0, ""),),
        inputs=tensor_infos(model.graph.inputs),
        outputs=tensor_infos(model.graph.outputs),
        dimensions={"B": spec.batch, "N": spec.num_tokens, "M": spec.num_words, **(dimensions or {})},
        budget=spec.budget,
        form=spec.form,
        constants=spec.config,
        versions=_versions(),
        requires=_requires(model),
        created=now(),
        check=Check("not run", "", "--skip-check"),
        share="" if spec.share is None else str(Budget(ratio=spec.share)),
        details=dict(details or {}),
    )
    with new_artifact(path, force=force) as file:
        on_step(f"writing {path.name}")
        model.metadata_props.update(manifest.metadata())
        _save_model(model, file)
        if "pixels" in manifest.details:
            processor = processor_config(manifest.details["image_size"], manifest.details["pixels"])
            file.with_name(f"{file.name}{PROCESSOR_SUFFIX}").write_text(
                json.dumps(processor, indent=2) + "\n", encoding="utf-8"
            )
        on_step("computing checksums")
        manifest = replace(manifest, files=file_infos(file))
        _write_manifest(file, manifest)
        if has_check:
            seconds = estimated_seconds(manifest)
            if seconds > _SECONDS_WITHOUT_A_WORD:
                on_note(f"the check takes about {seconds:.0f} s on this machine; --skip-check leaves it out")
            check = check_artifact(file, manifest, encoder=encoder, on_case=lambda case: on_step(f"checking {case}"))
            manifest = replace(manifest, check=check)
            _write_manifest(file, manifest)
    return manifest


def _write_manifest(file: Path, manifest: Manifest) -> None:
    Manifest.path_of(file).write_text(manifest.to_json(), encoding="utf-8")


def _check_source(path: Path, model: ir.Model, source: Path | None) -> None:
    """Raises FileExistsError if the export would overwrite a file that the model is read from."""
    weights = {Path(tensor.path) for tensor in _weights(model) if isinstance(tensor, ir.ExternalTensor)}
    for read in [*weights, *([source] if source else [])]:
        for written in files_of(path):
            if written.exists() and written.samefile(read):
                raise FileExistsError(f"{written} is the source of the export: choose another --output")


def _weights(model: ir.Model) -> list[ir.TensorProtocol]:
    return [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]


def _save_model(model: ir.Model, path: Path) -> None:
    """Writes a model, with large weights in a file beside it, and runs ONNX's full check.

    Raises:
        ValueError: The model, a shape or a type is not valid.
        OSError: The model could not be written.
    """
    weights = _weights(model)
    is_large = sum(tensor.nbytes for tensor in weights) > _MAX_INLINE_BYTES
    # Weights in a file of another graph are copied, too.
    is_elsewhere = any(isinstance(tensor, ir.ExternalTensor) for tensor in weights)
    ir.save(model, path, external_data=f"{path.name}{WEIGHTS_SUFFIX}" if is_large or is_elsewhere else None)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"the graph is not valid ONNX: {error}") from error


def file_infos(path: Path) -> tuple[FileInfo, ...]:
    """Returns the files in a new artifact's folder: the file itself, then its weights and its image processor."""
    others = sorted(file for file in path.parent.iterdir() if file not in (path, Manifest.path_of(path)))
    return tuple(describe_file(file) for file in (path, *others))


def _versions() -> dict[str, str]:
    libraries = {"onnx": onnx, "onnxscript": onnxscript, "torch": torch}
    versions = {name: str(library.__version__) for name, library in libraries.items()}
    return {"mmtok-deploy": __version__, **versions, "onnxruntime": VERSION}


def _requires(model: ir.Model) -> dict[str, str]:
    """Returns the versions that a runtime must support; for ONNX Runtime, the oldest version that was tested."""
    opset, ir_version = model.graph.opset_imports.get("", 0), model.ir_version
    needed = {"onnx opset": str(opset), "onnx ir version": str(ir_version)}
    domains = {domain: str(version) for domain, version in model.opset_imports.items() if domain not in _ONNX_DOMAINS}
    needed |= {f"operators of {domain}": version for domain, version in domains.items()}
    is_tried = opset <= _TRIED_OPSET and ir_version <= _TRIED_IR_VERSION and not domains
    return needed | ({"onnxruntime": _OLDEST_ONNX_RUNTIME} if is_tried else {})


def now() -> str:
    """Returns the current time, as manifests have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
