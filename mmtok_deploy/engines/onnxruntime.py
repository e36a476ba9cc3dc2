"""Runs ONNX files by ONNX Runtime on PyTorch's memory, without copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from mmtok_deploy.engines import EngineError, allocate_outputs, check_graph, check_inputs
from mmtok_deploy.environment import tf32_is_forbidden
from mmtok_deploy.manifest import ArtifactError, Manifest, TensorInfo

__all__ = ["VERSION", "OnnxRuntimeEngine", "run_on_cpu"]

VERSION: str = onnxruntime.__version__
"""The version of the library, whichever of its distributions (onnxruntime, onnxruntime-gpu) is installed."""

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_DEVICE_OF = {_CPU: "cpu", _CUDA: "cuda", _TENSORRT: "cuda"}

# onnx.TensorProto.DataType, which is how ONNX Runtime takes a type that numpy does not have.
_ELEMENT_TYPES = {
    torch.float32: 1,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}


# ONNX Runtime's type -> PyTorch's dtype.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxRuntimeEngine:
    """An ONNX file in one ONNX Runtime session; see `Engine`.

    Args:
        file: The ONNX file.
        manifest: Its manifest.
        device: Device of inputs and outputs.
        provider: CPUExecutionProvider, CUDAExecutionProvider or TensorrtExecutionProvider; by default the device's.
        content: The file's bytes, which are loaded in its place; None reads the file. External weights are read from
            the file's folder.

    Raises:
        ArtifactError: Inputs or outputs differ from the manifest.
        EngineError: The provider is not in this build of ONNX Runtime, is for another device, or does not start.
    """

    def __init__(
        self,
        file: Path,
        manifest: Manifest,
        device: torch.device,
        provider: str | None = None,
        content: bytes | None = None,
    ) -> None:
        provider = provider or (_CUDA if device.type == "cuda" else _CPU)
        _check_provider(provider, device)
        # A stream of its own: PyTorch's current stream changes from call to call, a session's never does.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        options = _options(file.parent)
        if device.type == "cpu":
            # PyTorch computes between the runs: its threads and these must not wait for each other in busy loops.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                file if content is None else content, options, providers=_providers(provider, device, self._stream)
            )
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise EngineError(f"ONNX Runtime cannot load {file.name}: {error}") from error
        # If a provider's libraries are missing, ONNX Runtime warns and falls back to the CPU.
        if self._session.get_providers()[0] != provider:
            raise EngineError(
                f"{provider} did not start, ONNX Runtime offers {', '.join(self._session.get_providers())} instead: "
                "are the libraries that it needs (CUDA, cuDNN, TensorRT) installed?"
            )
        self._session.disable_fallback()
        metadata = self._session.get_modelmeta().custom_metadata_map
        check_graph(manifest, _tensors(self._session.get_inputs()), _tensors(self._session.get_outputs()), metadata)
        self.name = f"onnxruntime {VERSION}, {provider}"
        self.manifest = manifest
        self._device = device

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Engine.run`."""
        sizes = check_inputs(self.manifest, inputs, self._device)
        outputs = allocate_outputs(self.manifest, sizes, self._device)
        # Kept until the run is over: a contiguous copy must outlive this line.
        contiguous = {name: tensor.contiguous() for name, tensor in inputs.items()}
        binding = self._session.io_binding()
        for name, tensor in contiguous.items():
            _bind(binding.bind_input, name, tensor)
        for name, tensor in outputs.items():
            _bind(binding.bind_output, name, tensor)
        try:
            self._run(binding, [*contiguous.values(), *outputs.values()])
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise EngineError(f"{self.name} does not run {self.manifest.files[0].name}: {error}") from error
        return outputs

    def _run(self, binding: Any, tensors: list[Tensor]) -> None:
        if self._stream is None:
            self._session.run_with_iobinding(binding)
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        self._session.run_with_iobinding(binding)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(self._stream)


def run_on_cpu(content: bytes, folder: Path, inputs: dict[str, Tensor], outputs: list[str]) -> dict[str, Tensor]:
    """Returns the outputs of a graph that has no manifest, run once on the CPU.

    Args:
        content: The graph.
        folder: Folder of its external weights.
        inputs: By name.
        outputs: Names.

    Raises:
        EngineError: ONNX Runtime does not load or run it: operators or types that its CPU provider does not have.
    """
    try:
        session = onnxruntime.InferenceSession(content, _options(folder), providers=[_CPU])
        values = session.run(outputs, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise EngineError(f"ONNX Runtime {VERSION} on the CPU: {error}") from error


def _options(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def _tensors(described: Any) -> list[TensorInfo]:
    """Returns ONNX Runtime's description of inputs or outputs."""
    tensors = []
    for each in described:
        if each.type not in _DTYPES:
            raise ArtifactError(f"{each.name} is a {each.type}, which no exported file has: export it again")
        # A size that has no name is None.
        tensors.append(TensorInfo(each.name, _DTYPES[each.type], tuple(size or "" for size in each.shape)))
    return tensors


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    device = tensor.device
    bind(name, device.type, device.index or 0, _ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def _check_provider(provider: str, device: torch.device) -> None:
    if provider not in _DEVICE_OF:
        raise EngineError(f"the ONNX Runtime provider is one of {', '.join(_DEVICE_OF)}, got {provider!r}")
    if _DEVICE_OF[provider] != device.type:
        raise EngineError(f"{provider} works on {_DEVICE_OF[provider]} tensors, these are on {device}")
    if provider == _TENSORRT and not tf32_is_forbidden():
        raise EngineError(
            f"{provider} multiplies float32 in TF32, which picks other tokens: set NVIDIA_TF32_OVERRIDE=0"
        )
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"this build of ONNX Runtime has no {provider}, only {', '.join(available)}: "
            "pip uninstall onnxruntime, then pip install 'mmtok-deploy[export-gpu]'"
        )


def _providers(
    provider: str, device: torch.device, stream: torch.cuda.Stream | None
) -> list[tuple[str, dict[str, str]]]:
    if stream is None:
        return [(provider, {})]
    on_device = {"device_id": str(device.index or 0), "user_compute_stream": str(stream.cuda_stream)}
    # TF32, on by default, would round the products of float32 features.
    cuda = (_CUDA, {**on_device, "use_tf32": "0"})
    return [cuda] if provider == _CUDA else [(provider, on_device), cuda]
