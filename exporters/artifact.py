"""Writing an exported file: whole, checked and with its manifest, or not at all."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import onnx
import onnx_ir as ir

from mmtok_deploy import __version__
from mmtok_deploy.manifest import FileInfo, Manifest, TensorInfo, describe_file

__all__ = ["file_infos", "new_artifact", "now", "save_model", "tensor_infos", "versions_of"]

# A protobuf message ends at 2 GiB, and loading a large one takes twice its size of memory.
_MAX_INLINE_BYTES = 256 * 2**20
_DTYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
}


@contextmanager
def new_artifact(path: Path, *, force: bool) -> Iterator[Path]:
    """Gives a file of that name in a folder of its own; what stands in the folder at the end moves beside `path`.

    Args:
        path: Where the file will be.
        force: Whether it may replace one.

    Raises:
        FileExistsError: It is there and may not be replaced.
    """
    for existing in (path, Manifest.path_of(path)):
        if existing.exists() and not force:
            raise FileExistsError(f"{existing} is there already: choose another --output, or --force to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        # The manifest comes last: without it nothing loads the file.
        written = sorted(folder.iterdir(), key=lambda file: file == Manifest.path_of(folder / path.name))
        for file in written:
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_model(model: ir.Model, path: Path) -> None:
    """Writes a model, with its weights in a file beside it where they are large, and has ONNX check it in full.

    Raises:
        onnx.checker.ValidationError: The model is not valid, shapes and types included.
        OSError: It could not be written.
    """
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if num_bytes > _MAX_INLINE_BYTES else None
    ir.save(model, path, external_data=external)
    onnx.checker.check_model(path, full_check=True)


def file_infos(path: Path) -> tuple[FileInfo, ...]:
    """Returns what stands in a new artifact's folder: the file itself, then its weights."""
    others = sorted(file for file in path.parent.iterdir() if file not in (path, Manifest.path_of(path)))
    return tuple(describe_file(file) for file in (path, *others))


def tensor_infos(values: Sequence[ir.Value]) -> tuple[TensorInfo, ...]:
    """Returns the manifest's entries for a graph's inputs or outputs."""
    return tuple(
        TensorInfo(
            value.name or "",
            _DTYPE_NAMES.get(value.dtype, str(value.dtype)) if value.dtype is not None else "unknown",
            tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ()),
        )
        for value in values
    )


def versions_of(*libraries: str) -> dict[str, str]:
    """Returns the versions of the libraries that made a file, this project's own first."""
    return {"mmtok-deploy": __version__, **{name: metadata.version(name) for name in libraries}}


def now() -> str:
    """Returns the time for a manifest."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
