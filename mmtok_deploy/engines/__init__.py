"""Runs exported files on PyTorch tensors; one module for each library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mmtok_deploy.manifest import BUDGET_DIMENSION, ArtifactError, Manifest, TensorInfo

__all__ = ["Engine", "EngineError", "allocate_outputs", "check_inputs", "check_graph", "open_engine"]


class EngineError(RuntimeError):
    """An exported file cannot run here: no library, no provider, another device, or inputs outside its ranges."""


class Engine(Protocol):
    """A loaded exported file."""

    @property
    def name(self) -> str:
        """Library, version, and provider or device."""

    @property
    def manifest(self) -> Manifest:
        """The file's manifest."""

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the outputs on the inputs' device, without synchronizing.

        Raises:
            EngineError: An input is missing, or has another dtype, device or size than the file takes.
        """


def open_engine(file: Path, device: torch.device, provider: str | None = None, sha256: str | None = None) -> Engine:
    """Returns an exported file, loaded for tensors on `device`.

    Args:
        file: An ONNX file or a TensorRT engine with its manifest.
        device: Device of inputs and outputs.
        provider: ONNX Runtime's provider; by default that of the device, CUDAExecutionProvider or
            CPUExecutionProvider.
        sha256: Checksum that the file must have, lower case; None accepts any file that matches its manifest.

    Raises:
        ArtifactError: The file is damaged, was not exported by this project, has another checksum than `sha256`, or
            other inputs and outputs than its manifest says.
        EngineError: The file cannot run on the device; the message says why.
    """
    manifest = Manifest.load(file)
    content = manifest.read_file(file, sha256)
    if manifest.format == "onnx":
        from mmtok_deploy.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(file, manifest, device, provider, content)
    if provider is not None:
        raise EngineError(f"{file.name} is a TensorRT engine, which has no providers to choose {provider} from")
    from mmtok_deploy.engines.tensorrt import TensorRTEngine

    return TensorRTEngine(file, manifest, device, content)


def check_graph(
    manifest: Manifest,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Raises ArtifactError if a graph is not the one that its manifest describes; called whenever a file is loaded.

    Args:
        manifest: The manifest.
        inputs: Inputs as the library reports them; a dynamic size is a name, or "" without one.
        outputs: Outputs, likewise.
        metadata: The graph's `metadata_props`: constants, form and ranges, which its tensors do not show. None for an
            engine, which has none.
    """
    for kind, described, found in (("inputs", manifest.inputs, inputs), ("outputs", manifest.outputs, outputs)):
        expected = {tensor.name: tensor for tensor in described}
        if len(expected) != len(described) or set(expected) != {tensor.name for tensor in found}:
            raise _not_described(manifest, f"{kind} {', '.join(each.name for each in found)}", ", ".join(expected))
        for tensor in found:
            wanted = expected[tensor.name]
            fits = len(tensor.shape) == len(wanted.shape) and all(
                _may_be(manifest, size, name) for size, name in zip(tensor.shape, wanted.shape, strict=True)
            )
            if tensor.dtype != wanted.dtype or not fits:
                raise _not_described(
                    manifest,
                    f"{tensor.name} as {tensor.dtype} {_shape(tensor)}",
                    f"{wanted.dtype} {_shape(wanted)}",
                )
    if metadata is not None:
        for name, said in manifest.metadata().items():
            if metadata.get(name) != said:
                raise _not_described(manifest, f"{name} {metadata.get(name)}", said)


def _may_be(manifest: Manifest, found: int | str, described: int | str) -> bool:
    if isinstance(described, int):
        return found == described
    allowed = manifest.dimensions.get(described)
    # An encoder's own sizes have no range; an engine with a fixed size takes that one only.
    return isinstance(found, str) or (allowed is not None and allowed.is_fixed and found == allowed.minimum)


def _not_described(manifest: Manifest, found: str, described: str) -> ArtifactError:
    return ArtifactError(
        f"{manifest.files[0].name} has {found}, its manifest says {described}: they do not belong "
        "together, export it again"
    )


def check_inputs(manifest: Manifest, inputs: dict[str, Tensor], device: torch.device) -> dict[str, int]:
    """Returns the size of each named dimension in these inputs.

    Raises:
        EngineError: An input is missing, or has another dtype, device or size than the file takes.
    """
    if set(inputs) != {expected.name for expected in manifest.inputs}:
        raise EngineError(f"the inputs are {', '.join(each.name for each in manifest.inputs)}, got {', '.join(inputs)}")
    sizes: dict[str, int] = {}
    for expected in manifest.inputs:
        found = inputs[expected.name]
        # The host reads the budget to allocate the outputs.
        place = torch.device("cpu") if expected.name == "budget" else device
        if found.dtype != getattr(torch, expected.dtype) or not _same_device(found.device, place):
            raise EngineError(
                f"{expected.name} is {expected.dtype} on {place}, got {str(found.dtype)[6:]} on {found.device}"
            )
        if len(found.shape) != len(expected.shape):
            raise EngineError(f"{expected.name} has shape {_shape(expected)}, got {tuple(found.shape)}")
        for size, wanted in zip(found.shape, expected.shape, strict=True):
            known = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            allowed_sizes = manifest.dimensions.get(str(wanted))
            if size != known or (allowed_sizes is not None and size not in allowed_sizes):
                ranges = ", ".join(f"{name} {allowed}" for name, allowed in manifest.dimensions.items())
                is_of_one = expected.name in manifest.details.get("one_image", ())
                advice = "several images would share one budget, run it once an image"
                raise EngineError(
                    f"{expected.name} has shape {_shape(expected)} ({ranges}), got {tuple(found.shape)}: "
                    f"{advice if is_of_one else 'export a file for these sizes'}"
                )
    if manifest.takes_budget:
        budgets = inputs["budget"].tolist()
        if not all(1 <= budget <= manifest.budget for budget in budgets):
            raise EngineError(f"budget is 1 to {manifest.budget} of each image, got {budgets}")
        sizes[BUDGET_DIMENSION] = max(budgets)
    elif manifest.share:
        sizes[BUDGET_DIMENSION] = manifest.num_kept(sizes["N"])
    return sizes


def allocate_outputs(manifest: Manifest, sizes: dict[str, int], device: torch.device) -> dict[str, Tensor]:
    """Returns empty tensors for every output.

    Raises:
        ArtifactError: An output has a named size that no input has.
    """
    outputs = {}
    for output in manifest.outputs:
        unknown = [size for size in output.shape if isinstance(size, str) and size not in sizes]
        if unknown:
            raise ArtifactError(f"output {output.name} has the size {unknown[0]}, which no input has")
        shape = [sizes[size] if isinstance(size, str) else size for size in output.shape]
        outputs[output.name] = torch.empty(shape, dtype=getattr(torch, output.dtype), device=device)
    return outputs


def _same_device(found: torch.device, expected: torch.device) -> bool:
    # A device without an index means index 0; a tensor's device always has one.
    return found.type == expected.type and (found.index or 0) == (expected.index or 0)


def _shape(tensor: TensorInfo) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
