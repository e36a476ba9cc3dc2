"""Which TensorRT library can build an engine for a GPU, and from which machine."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Literal

__all__ = ["LIBRARIES", "RTX_TARGETS", "Library", "check_targets", "choose_library", "engine_path", "wanted_targets"]

RTX_TARGETS = frozenset({"8.0", "8.6", "8.9", "12.0", "12.1"})
"""Compute capabilities for which TensorRT-RTX 1.7 builds a selection: not Hopper, nor datacenter Blackwell."""

# TensorRT-RTX 1.7 lists it, but cannot build float32 matrix products for it ("FP32 GEMM is not supported"), which every
# selection needs.
_WITHOUT_FLOAT32 = "7.5"

# Their TensorRT comes with JetPack; PyPI has no package of it.
_JETSONS = {"8.7": "Orin", "11.0": "Thor"}

Library = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: tuple[Library, ...] = ("tensorrt-rtx", "tensorrt")

_MAX_BUDGET = 3840


def choose_library(targets: list[str]) -> Library:
    """Returns the library that can build for these compute capabilities on this machine.

    TensorRT-RTX builds for any of its targets, with or without a GPU. TensorRT builds only for this machine's GPU.

    Args:
        targets: Compute capabilities ("8.6"); empty for this machine's GPU.

    Raises:
        ValueError: Neither library can; the message says what to install.
    """
    wanted = wanted_targets(targets)
    if set(wanted) <= RTX_TARGETS:
        return "tensorrt-rtx"
    if wanted == [_at_hand()]:
        return "tensorrt"
    raise _no_engine_for(wanted)


def check_targets(library: Library, targets: list[str], budget: int) -> None:
    """Raises ValueError if the library cannot build for these compute capabilities here, or for such a budget."""
    wanted = wanted_targets(targets)
    if library == "tensorrt-rtx" and not set(wanted) <= RTX_TARGETS:
        raise _no_engine_for(wanted)
    if library == "tensorrt" and wanted != [_at_hand()]:
        raise ValueError(f"TensorRT builds for the GPU at hand alone, not for {', '.join(wanted)}: leave --target out")
    if budget > _MAX_BUDGET:
        raise ValueError(f"TensorRT keeps at most {_MAX_BUDGET} tokens (its TopK), got a budget of {budget}")


def _no_engine_for(wanted: list[str]) -> ValueError:
    others = ", ".join(target for target in wanted if target not in RTX_TARGETS)
    reason = f" (for {_WITHOUT_FLOAT32} it multiplies no float32 matrices)" if _WITHOUT_FLOAT32 in wanted else ""
    no_engine = (
        f"TensorRT-RTX has no engines for compute capability {others}{reason}, and TensorRT builds on the GPU itself"
    )
    jetsons = [_JETSONS[target] for target in wanted if target in _JETSONS]
    if jetsons:
        return ValueError(
            f"{no_engine}: export without --tensorrt, copy the file to the Jetson {jetsons[0]}, and run there the "
            "trtexec command that the export prints"
        )
    return ValueError(
        f"{no_engine}: on a machine with that GPU, pip install 'mmtok-deploy[tensorrt]' and export again there, or "
        "mmtok export engine FILE.onnx; or run the ONNX file by ONNX Runtime's CUDA provider"
    )


def engine_path(onnx_file: Path, library: Library, targets: list[str]) -> Path:
    """Returns the path of an ONNX file's engine, such as `NAME.sm86.rtx.engine` or `NAME.sm90.engine`."""
    capabilities = "-".join(f"sm{target.replace('.', '')}" for target in wanted_targets(targets))
    return onnx_file.with_name(f"{onnx_file.stem}.{capabilities}{'.rtx' if library == 'tensorrt-rtx' else ''}.engine")


def wanted_targets(targets: list[str]) -> list[str]:
    """Returns the compute capabilities to build for: those given, or that of this machine's GPU.

    Raises:
        ValueError: None is given, and there is no GPU.
    """
    if targets:
        return targets
    at_hand = _at_hand()
    if at_hand is None:
        raise ValueError("there is no NVIDIA GPU here to build for: name one, such as --target 8.6 (RTX A6000)")
    return [at_hand]


def _at_hand() -> str | None:
    """Returns the compute capability of this machine's GPU; None without one."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        # Without a driver there is no GPU, and PyTorch takes seconds to import.
        return None
    import torch

    from mmtok_deploy.engines.tensorrt import compute_capability

    return compute_capability() if torch.cuda.is_available() else None
