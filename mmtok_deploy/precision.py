"""Float32 matrix products in full float32, whatever precision the process allows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["float32_products"]

# PyTorch has one setting for all threads: without the lock, one thread would restore it during another's product.
_ONE_AT_A_TIME = threading.RLock()
_ROUNDED = ("tf32", "bf16")


@contextmanager
def float32_products() -> Iterator[None]:
    """Keeps PyTorch from rounding float32 matrices to multiply them faster; restores the previous setting on exit.

    A flag of a server or a variable of the environment allows it for the whole process (SGLang's
    --enable-tf32-matmul, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1): TF32 on a GPU, bfloat16 on some CPUs. Either picks
    other tokens.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with _ONE_AT_A_TIME:
        allowed = [backend.fp32_precision for backend in backends]
        if not any(precision in _ROUNDED for precision in allowed):
            yield
            return
        of_all = _precision_of_all()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(of_all)
            for backend, precision in zip(backends, allowed, strict=True):
                backend.fp32_precision = precision


def _precision_of_all() -> str:
    """Returns PyTorch's older setting for all backends; "highest" where a backend's own setting contradicts it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"
