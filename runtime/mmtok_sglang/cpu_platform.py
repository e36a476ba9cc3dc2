"""SGLang on plain PyTorch: the platform that runs a server on a machine without an accelerator."""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from torch import nn

from mmtok_sglang.cpu_linear_attention import use_torch_for_linear_attention

__all__ = ["TorchCpuPlatform"]


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU without SGLang's compiled kernels: PyTorch operators and attention, no optional capability."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        # SGLang pins the frames of a video, which takes an accelerator's driver.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]

    def get_default_attention_backend(self) -> str:
        """Returns the attention backend that needs nothing but PyTorch."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Returns the suffix of the operator implementations to use: `forward_native`."""
        return "native"

    def get_device(self, device_id: int = 0) -> str:
        """Returns "cpu": the text that `--device` defaults to (the mixin's torch.device is not accepted there)."""
        return "cpu"

    def support_mamba_cache_extra_buffer(self) -> bool:
        """Returns True: the prefix cache keeps states of linear attention as it does on a GPU."""
        return True

    def post_load_model(self, model: nn.Module) -> None:
        """Has a model's linear attention run without Triton."""
        use_torch_for_linear_attention(model)
