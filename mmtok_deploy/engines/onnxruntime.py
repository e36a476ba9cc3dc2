"""ONNX files by ONNX Runtime, on PyTorch's memory: nothing is copied in or out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from mmtok_deploy.engines import EngineError, allocate_outputs, check_inputs
from mmtok_deploy.manifest import Manifest

__all__ = ["OnnxRuntimeEngine"]

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_DEVICE_OF = {_CPU: "cpu", _CUDA: "cuda", _TENSORRT: "cuda"}

# onnx.TensorProto.DataType, which is how ONNX Runtime takes a type that numpy does not have.
_ELEMENT_TYPES = {torch.float32: 1, torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.bfloat16: 16}


class OnnxRuntimeEngine:
    """An ONNX file in one ONNX Runtime session; see `Engine`.

    Args:
        file: The ONNX file.
        manifest: Its manifest.
        device: Where inputs and outputs are.
        provider: CPUExecutionProvider, CUDAExecutionProvider or TensorrtExecutionProvider; by default the device's.

    Raises:
        EngineError: The provider is not in this build of ONNX Runtime, is for another device, or does not start.
    """

    def __init__(self, file: Path, manifest: Manifest, device: torch.device, provider: str | None = None) -> None:
        provider = provider or (_CUDA if device.type == "cuda" else _CPU)
        _check_provider(provider, device)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        if device.type == "cpu":
            # PyTorch computes between the runs: its threads and these must not wait for each other in busy loops.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                file, options, providers=[(provider, _provider_options(provider, device))]
            )
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise EngineError(f"ONNX Runtime cannot load {file.name}: {error}") from error
        # Where a provider's own libraries are missing, ONNX Runtime warns and takes the CPU.
        if self._session.get_providers()[0] != provider:
            raise EngineError(
                f"{provider} did not start, ONNX Runtime offers {', '.join(self._session.get_providers())} instead: "
                "are the libraries that it needs (CUDA, cuDNN, TensorRT) installed?"
            )
        self._session.disable_fallback()
        self.name = f"onnxruntime {onnxruntime.__version__}, {provider}"
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
        self._session.run_with_iobinding(binding)
        return outputs


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    device = tensor.device
    bind(name, device.type, device.index or 0, _ELEMENT_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def _check_provider(provider: str, device: torch.device) -> None:
    if provider not in _DEVICE_OF:
        raise EngineError(f"the ONNX Runtime provider is one of {', '.join(_DEVICE_OF)}, got {provider!r}")
    if _DEVICE_OF[provider] != device.type:
        raise EngineError(f"{provider} works on {_DEVICE_OF[provider]} tensors, these are on {device}")
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"this build of ONNX Runtime has no {provider}, only {', '.join(available)}: "
            "pip uninstall onnxruntime, then pip install 'mmtok-deploy[export-gpu]'"
        )


def _provider_options(provider: str, device: torch.device) -> dict[str, str]:
    if provider == _CPU:
        return {}
    # On PyTorch's stream: inputs are ready when the session reads them, and outputs when PyTorch does.
    stream = torch.cuda.current_stream(device).cuda_stream
    return {"device_id": str(device.index or 0), "user_compute_stream": str(stream)}
