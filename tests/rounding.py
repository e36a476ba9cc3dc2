"""Matrix products whose last bits are other ones, as another processor's are: for `pytest --perturb-products`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["PerturbedProducts"]

_PRODUCTS = {"mm", "bmm", "mv", "addmm"}
# Relative to the sum of the terms' magnitudes, which is at most 1 for unit vectors: cosines were off by up to 5e-7.
_LARGEST_ERROR = 3e-7


class PerturbedProducts(TorchDispatchMode):
    """Adds rounding errors to every inexact entry of a float32 matrix product on the CPU, within this context.

    An entry's error depends on its place and the product's shape alone: as on a real processor, the same product
    gives the same bits twice, and equal rows at two places may give different ones. Entries that are exact in float32
    have the same bits on every processor, and stay.

    Args:
        seed: Draws the errors.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Tensors of another class stand for shapes alone, while a model is exported.
        if func.overloadpacket.__name__ not in _PRODUCTS or type(result) is not Tensor:
            return result
        if result.dtype != torch.float32 or result.device.type != "cpu" or not result.numel():
            return result
        operands = [each for each in args if isinstance(each, Tensor)]
        name = func.overloadpacket.__name__
        exact = _product(name, [each.double() for each in operands])
        magnitude = _product(name, [each.double().abs() for each in operands])
        generator = torch.Generator().manual_seed(hash((self._seed, *result.shape)) & 0xFFFF_FFFF)
        draws = torch.rand(result.shape, generator=generator, dtype=torch.float32)
        perturbed = torch.where(
            result == exact, result, result + (2 * draws - 1) * (_LARGEST_ERROR * magnitude).float()
        )
        return result.copy_(perturbed)


def _product(name: str, operands: list[Tensor]) -> Tensor:
    return operands[0] + operands[1] @ operands[2] if name == "addmm" else operands[0] @ operands[1]
