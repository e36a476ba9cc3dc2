"""TensorRT and TensorRT-RTX engines on PyTorch's memory and stream."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok_deploy.engines import EngineError, allocate_outputs, check_graph, check_inputs
from mmtok_deploy.manifest import ArtifactError, Manifest, TensorInfo

__all__ = ["TensorRTEngine", "compute_capability", "engine_tensors", "tensorrt_module"]


# TensorRT's type -> PyTorch's dtype.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


class TensorRTEngine:
    """A serialized engine, deserialized for one GPU; see `Engine`.

    Args:
        file: The engine.
        manifest: Its manifest.
        device: A CUDA device.
        content: The file's bytes, which are loaded in its place; None reads the file.

    Raises:
        ArtifactError: Inputs or outputs differ from the manifest.
        EngineError: There is no GPU, or the engine was built for another compute capability; the library is not
            installed or has another version; or TensorRT rejects the file.
    """

    def __init__(self, file: Path, manifest: Manifest, device: torch.device, content: bytes | None = None) -> None:
        if device.type != "cuda":
            raise EngineError(f"{file.name} is a TensorRT engine, which runs on an NVIDIA GPU, not on {device}")
        _check_compute_capability(file, manifest, device)
        library = tensorrt_module(manifest.format)
        built_with = manifest.versions.get(manifest.format, "of an unknown version")
        if library.__version__ != built_with:
            raise EngineError(
                f"{file.name} was built by {manifest.format} {built_with}, installed is {library.__version__}: "
                "build it again here, or install that version"
            )
        self._log = library.Logger(library.Logger.ERROR)
        with torch.cuda.device(device):
            self._runtime = library.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes() if content is None else content)
            if self._engine is None:
                raise EngineError(f"TensorRT does not take {file.name}: its messages are above")
            check_graph(manifest, *engine_tensors(self._engine))
            self._context = self._engine.create_execution_context()
        self.name = f"{manifest.format} {library.__version__} on {torch.cuda.get_device_name(device)}"
        self.manifest = manifest
        self._device = device

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Engine.run`."""
        sizes = check_inputs(self.manifest, inputs, self._device)
        # On the stream of the run, so PyTorch reuses the memory of the copies only after it.
        contiguous = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in contiguous.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"TensorRT does not take {name} of shape {tuple(tensor.shape)}")
        outputs = allocate_outputs(self.manifest, sizes, self._device)
        for name, tensor in outputs.items():
            # Checked because the engine writes this shape, whatever the manifest says.
            writes = tuple(self._context.get_tensor_shape(name))
            if writes != tuple(tensor.shape):
                raise EngineError(
                    f"TensorRT would write {name} of shape {writes}, its manifest says {tuple(tensor.shape)}: "
                    "export it again"
                )
        for name, tensor in (contiguous | outputs).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise EngineError("TensorRT did not run: its messages are above")
        return outputs


def engine_tensors(engine: Any) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Returns a TensorRT engine's inputs and outputs; a dynamic size is "".

    Raises:
        ArtifactError: A tensor of a type that no exported file has.
    """
    tensors: dict[str, list[TensorInfo]] = {"INPUT": [], "OUTPUT": []}
    for idx in range(engine.num_io_tensors):
        name = engine.get_tensor_name(idx)
        dtype = engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise ArtifactError(f"{name} is a {dtype}, which no exported file has: export it again")
        shape = tuple("" if size < 0 else size for size in engine.get_tensor_shape(name))
        tensors[engine.get_tensor_mode(name).name].append(TensorInfo(name, _DTYPES[dtype], shape))
    return tensors["INPUT"], tensors["OUTPUT"]


def tensorrt_module(name: str) -> Any:
    """Returns the library `tensorrt` or `tensorrt-rtx`; both have one API.

    Raises:
        EngineError: It is not installed.
    """
    try:
        match name:
            case "tensorrt":
                return importlib.import_module("tensorrt")
            case "tensorrt-rtx":
                return importlib.import_module("tensorrt_rtx")
            case _:
                raise ValueError(f"the library is tensorrt or tensorrt-rtx, got {name!r}")
    except ImportError as error:
        raise EngineError(f"{name} is not installed ({error}): pip install 'mmtok-deploy[{name}]'") from error


def compute_capability(device: torch.device | None = None) -> str:
    """Returns a GPU's compute capability, such as "8.6"; by default the current GPU's."""
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def _check_compute_capability(file: Path, manifest: Manifest, device: torch.device) -> None:
    found = compute_capability(device)
    named = manifest.details.get("compute_capabilities")
    built_for = [str(each) for each in named] if isinstance(named, list) else []
    if found not in built_for:
        raise EngineError(
            f"{file.name} was built for compute capability {', '.join(built_for)}, "
            f"{torch.cuda.get_device_name(device)} has {found}: build one for it"
        )
