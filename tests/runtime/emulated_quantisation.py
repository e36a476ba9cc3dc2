"""An SGLang plugin for tests alone: checkpoints in FP8, AWQ and GPTQ served without a GPU.

SGLang's own classes read the quantised weights. Its kernels, which multiply by them, are replaced by PyTorch's product
with the weights that the numbers stand for; numbers between layers are not quantised.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mmtok_soak.second_plugin import plugin_environment
from tests.runtime.quantised import Quantisation, dequantised

__all__ = ["quantisation_environment", "register"]

_PARTS: dict[Quantisation, tuple[str, ...]] = {
    "fp8": ("weight", "weight_scale_inv"),
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales"),
}


def quantisation_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a server on a CPU that reads quantised checkpoints."""
    return plugin_environment(folder, "mmtok_test_quantisation", f"{__name__}:register", Path(__file__).parents[2])


def register() -> None:
    """Puts PyTorch operations in the place of the kernels."""
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.layers.quantization.awq.awq import AWQConfig, AWQLinearMethod
    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
    from sglang.srt.layers.quantization.gptq.gptq import GPTQConfig, GPTQLinearMethod
    from sglang.srt.layers.quantization.gptq.schemes.gptq_linear import GPTQLinearScheme

    GPTQLinearScheme._init_kernel = lambda *_: SimpleNamespace()
    methods: dict[Quantisation, tuple[Any, Any]] = {
        "fp8": (Fp8Config, Fp8LinearMethod),
        "awq": (AWQConfig, AWQLinearMethod),
        "gptq": (GPTQConfig, GPTQLinearMethod),
    }
    for name, (config, method) in methods.items():
        QUANTIZATION_METHODS[name] = config
        # In float32, to be compared with the reference.
        config.get_supported_act_dtypes = lambda *_: [torch.float32]
        method.process_weights_after_loading = lambda *_: None
        method.apply = _product_of(name)


def _product_of(method: Quantisation) -> Any:
    def apply(_: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        parts = {name: getattr(layer, name) for name in _PARTS[method]}
        return linear(x, dequantised(method, parts).to(x.dtype), bias)

    return apply
