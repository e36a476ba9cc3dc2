"""Writing an exported file: whole, checked and with its manifest, or not at all."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from mmtok_export.pixels import processor_config
from mmtok_export.selection_graph import SelectionSpec
from mmtok_export.whole_graph import Encoder

__all__ = ["check_output", "export_model", "file_infos", "new_artifact", "now"]

# A protobuf message ends at 2 GiB, and loading a large one takes twice its size of memory.
_MAX_INLINE_BYTES = 256 * 2**20
_WEIGHTS_SUFFIX = ".data"
_PROCESSOR_SUFFIX = ".processor_config.json"
_ONNX_DOMAINS = ("", "ai.onnx")
# What ONNX Runtime 1.18 reads.
_OLDEST_ONNX_RUNTIME, _TRIED_OPSET, _TRIED_IR_VERSION = "1.18", 21, 10
_SECONDS_WITHOUT_A_WORD = 10
# The beginning of the name of the folder that a file is made in, beside where it will be.
_UNFINISHED = ".mmtok-unfinished"


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
    """Writes a model that holds a selection as an ONNX file, checked against the reference; returns its manifest.

    Args:
        model: What to write.
        path: Where.
        kind: What the model is.
        spec: Its selection.
        details: For the manifest.
        dimensions: Ranges of further named sizes.
        source: The file that the model was read from, which stays; so do its weights.
        encoder: What the encoder in the model was made from, which the check holds it against.
        has_check: Whether it is checked.
        force: Whether it may replace a file.
        on_step: Called with what is done next.
        on_note: Called with what the user should know of it.

    Raises:
        FileExistsError: The file is there and may not be replaced.
        OSError: It could not be written.
        CheckFailedError: The graph does not give the reference's answer.
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
            file.with_name(f"{file.name}{_PROCESSOR_SUFFIX}").write_text(
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


@contextmanager
def new_artifact(path: Path, *, force: bool) -> Iterator[Path]:
    """Gives a file of that name in a folder of its own; what stands in the folder at the end moves beside `path`.

    Args:
        path: Where the file will be.
        force: Whether it may replace one.

    Raises:
        FileExistsError: It is there and may not be replaced.
    """
    check_output(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        _clear_unfinished(path.parent)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent))
        # Held while this process lives, however it ends.
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder / path.name
        # Minutes may have passed, in which another export wrote it.
        check_output(path, force=force)
        # The manifest comes last: without it nothing loads the file.
        written = sorted(folder.iterdir(), key=lambda file: file == Manifest.path_of(folder / path.name))
        for file in _files_of(path):
            file.unlink(missing_ok=True)
        for file in written:
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _clear_unfinished(parent: Path) -> None:
    """Removes what an export that was killed has left: gigabytes, of which nobody would know."""
    for folder in parent.glob(f".*{_UNFINISHED}"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # another export, at work
            pass
        finally:
            os.close(lock)


def check_output(path: Path, *, force: bool) -> None:
    """Raises FileExistsError if a file, or one that is written beside it, is there and may not be replaced."""
    if path.is_dir() or not path.name:
        raise FileExistsError(f"{path} is a folder: name a file, --output FILE")
    for existing in _files_of(path):
        if existing.is_symlink() and not existing.exists():
            raise FileExistsError(f"{existing} is a link to {existing.readlink()}, which is not there: remove the link")
        if existing.exists() and not force:
            raise FileExistsError(f"{existing} is there already: choose another --output, or --force to replace it")


def _check_source(path: Path, model: ir.Model, source: Path | None) -> None:
    """Raises FileExistsError if one of the files to write is one that the model is read from."""
    weights = {Path(tensor.path) for tensor in _weights(model) if isinstance(tensor, ir.ExternalTensor)}
    for read in [*weights, *([source] if source else [])]:
        for written in _files_of(path):
            if written.exists() and written.samefile(read):
                raise FileExistsError(f"{written} is what is exported from: choose another --output")


def _weights(model: ir.Model) -> list[ir.TensorProtocol]:
    return [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]


def _files_of(path: Path) -> list[Path]:
    beside = (path.with_name(f"{path.name}{suffix}") for suffix in (_WEIGHTS_SUFFIX, _PROCESSOR_SUFFIX))
    return [path, *beside, Manifest.path_of(path)]


def _save_model(model: ir.Model, path: Path) -> None:
    """Writes a model, with its weights in a file beside it where they are large, and has ONNX check it in full.

    Raises:
        ValueError: The model is not valid, shapes and types included.
        OSError: It could not be written.
    """
    weights = _weights(model)
    is_large = sum(tensor.nbytes for tensor in weights) > _MAX_INLINE_BYTES
    # Weights that stand in a file beside another graph come along.
    is_elsewhere = any(isinstance(tensor, ir.ExternalTensor) for tensor in weights)
    ir.save(model, path, external_data=f"{path.name}{_WEIGHTS_SUFFIX}" if is_large or is_elsewhere else None)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"the graph is not valid ONNX: {error}") from error


def file_infos(path: Path) -> tuple[FileInfo, ...]:
    """Returns what stands in a new artifact's folder: the file itself, then its weights and its image processor."""
    others = sorted(file for file in path.parent.iterdir() if file not in (path, Manifest.path_of(path)))
    return tuple(describe_file(file) for file in (path, *others))


def _versions() -> dict[str, str]:
    libraries = {"onnx": onnx, "onnxscript": onnxscript, "torch": torch}
    versions = {name: str(library.__version__) for name, library in libraries.items()}
    return {"mmtok-deploy": __version__, **versions, "onnxruntime": VERSION}


def _requires(model: ir.Model) -> dict[str, str]:
    """Returns what a runtime must read; ONNX Runtime's version is the oldest that was tried."""
    opset, ir_version = model.graph.opset_imports.get("", 0), model.ir_version
    needed = {"onnx opset": str(opset), "onnx ir version": str(ir_version)}
    domains = {domain: str(version) for domain, version in model.opset_imports.items() if domain not in _ONNX_DOMAINS}
    needed |= {f"operators of {domain}": version for domain, version in domains.items()}
    is_tried = opset <= _TRIED_OPSET and ir_version <= _TRIED_IR_VERSION and not domains
    return needed | ({"onnxruntime": _OLDEST_ONNX_RUNTIME} if is_tried else {})


def now() -> str:
    """Returns the time for a manifest."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
