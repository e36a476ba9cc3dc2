"""Runs a whole graph with an encoder on photographs, and compares it with the encoder and the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from mmtok_deploy.engines import EngineError
from mmtok_deploy.engines.onnxruntime import run_on_cpu
from mmtok_deploy.manifest import Manifest, TensorInfo
from mmtok_export.graph_file import load_graph
from mmtok_export.picks import CheckFailedError, Compared, hold_image
from mmtok_export.pixels import images_of, patches_of

__all__ = ["SELECTION_INPUTS", "SELECTION_OUTPUTS", "CannotRunError", "Encoder", "check_whole_graph"]

Encoder = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
"""Runs an encoder without the selection: inputs by name -> vision [B, N, D] and keys [B, N, d]."""

SELECTION_INPUTS = ("text", "text_mask", "excluded", "budget")
SELECTION_OUTPUTS = ("kept", "order", "visual_tokens", "coverage", "total")

# Largest differences relative to the length of all features: sums have another order, and are rounded each time in
# float16 and bfloat16.
_TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 3e-1}
_MAX_IMAGES = 2
# Domains of ONNX Runtime's own operators.
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


class CannotRunError(Exception):
    """The whole graph cannot run on this machine; the message has the reason."""


def check_whole_graph(
    file: Path, manifest: Manifest, encoder: Encoder | None = None, given: dict[str, Tensor] | None = None
) -> str:
    """Checks a whole graph, and returns a sentence on what was compared.

    Args:
        file: An ONNX file of an encoder and a selection.
        manifest: Its manifest.
        encoder: Runs the original encoder; by default the encoder is extracted from the file.
        given: Inputs of the file; by default photographs and random text.

    Raises:
        CheckFailedError: Features are not finite or differ from the encoder's, or a pick differs from the reference's.
        CannotRunError: The CPU cannot run the graph, or the meaning of its inputs is not known.
    """
    model = load_graph(file, manifest)
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in model.graph if node.domain not in _DOMAINS})
    if foreign:
        raise CannotRunError(f"the CPU has no {', '.join(foreign)}")
    edges = {name: str(edge["name"]) for name, edge in manifest.details["edges"].items()}
    inputs = dict(given or {})
    for tensor in manifest.inputs:
        if tensor.name not in (*SELECTION_INPUTS, "tile_grid") and tensor.name not in inputs:
            inputs[tensor.name] = _pictures(tensor, manifest)
    try:
        vision, keys = (encoder or _cut_out(model, file.parent, edges))(inputs)
        inputs = _question(manifest, vision) | inputs
        # The outputs are those of the selection and the features that it reads.
        for name in edges.values():
            model.graph.outputs.append(_value(model, name))
        for value in list(model.graph.outputs):
            if value.name not in (*SELECTION_OUTPUTS, *edges.values()):
                model.graph.outputs.remove(value)
        outputs = run_on_cpu(_bytes(model), file.parent, inputs, [*SELECTION_OUTPUTS, *edges.values()])
    except EngineError as error:
        raise CannotRunError(str(error)) from error
    found = {name: outputs[edge] for name, edge in edges.items()}
    # Keys may be float32 sums of what was rounded in the encoder: one dtype of the two is the encoder's.
    allowed = max(_TOLERANCE[str(edge["dtype"])] for edge in manifest.details["edges"].values())
    distances = [_distance(name, found[name], apart, allowed) for name, apart in (("vision", vision), ("keys", keys))]
    compared = Compared()
    features = found | {name: inputs[name] for name in SELECTION_INPUTS if name in inputs}
    for image in range(len(vision)):
        compared.add(
            hold_image(
                {name: tensor[image] for name, tensor in features.items()},
                {name: outputs[name][image] for name in SELECTION_OUTPUTS},
                manifest,
            )
        )
    shown = "the given inputs" if given else "photographs"
    return f"the whole graph on {shown}: {compared}; features as of the encoder alone within {max(distances):.0e}"


def _distance(name: str, found: Tensor, apart: Tensor, allowed: float) -> float:
    if not (found.isfinite().all() and apart.isfinite().all()):
        raise CheckFailedError(f"the encoder's {name} are not finite (NaN or infinite): look at its weights")
    if found.shape != apart.shape:
        raise CheckFailedError(f"{name} are {list(found.shape)}, of the encoder alone {list(apart.shape)}")
    found, apart = found.double(), apart.double()
    distance = float((found - apart).norm() / apart.norm().clamp(min=1e-30))
    if distance > allowed:
        raise CheckFailedError(
            f"{name} are not those of the encoder alone: they differ by {distance:.1e} of their length, "
            f"allowed {allowed}"
        )
    return distance


def _cut_out(model: ir.Model, folder: Path, edges: dict[str, str]) -> Encoder:
    """Returns a function that runs the encoder in the graph."""

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        graph = ir.convenience.extract(model.graph, list(inputs), list(edges.values()))
        alone = ir.Model(graph, ir_version=model.ir_version)
        found = run_on_cpu(_bytes(alone), folder, inputs, list(edges.values()))
        return found[edges["vision"]], found[edges["keys"]]

    return run


def _bytes(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _value(model: ir.Model, name: str) -> ir.Value:
    for node in model.graph:
        for value in node.outputs:
            if value.name == name:
                return value
    raise CheckFailedError(f"the graph has no tensor {name}, which its manifest names")


def _pictures(tensor: TensorInfo, manifest: Manifest) -> Tensor:
    """Returns photographs in the layout of this input, or their grid."""
    layout = manifest.details.get("pixels") or {}
    if tensor.name == "grid_thw" and layout:
        patches = (length // layout["patch_size"] for length in reversed(manifest.details["image_size"]))
        return torch.tensor([[1, *patches]])
    if layout.get("layout") == "patches":
        images = images_of(tuple(manifest.details["image_size"]), manifest.dimensions["B"].minimum, **layout)
        return patches_of(images, **layout)
    sizes = [_size(size, manifest) for size in tensor.shape]
    if len(sizes) != 4 or 3 not in (sizes[1], sizes[3]) or tensor.dtype not in _TOLERANCE:
        raise CannotRunError(
            f"its input {tensor.name} {list(tensor.shape)} is no image [B, 3, H, W]: give all of its inputs, --features"
        )
    batch, *lengths = sizes
    is_first = lengths[0] == 3
    height, width = lengths[1:] if is_first else lengths[:2]
    images = images_of((width, height), batch, **layout).to(getattr(torch, tensor.dtype))
    return images if is_first else images.permute(0, 2, 3, 1).contiguous()


def _size(size: int | str, manifest: Manifest) -> int:
    if isinstance(size, int):
        return size
    allowed = manifest.dimensions.get(size)
    if allowed is None:
        raise CannotRunError(f"the dimension {size} of an input has no range: --dim {size}=SIZE")
    return min(allowed.maximum, max(allowed.minimum, _MAX_IMAGES)) if size == "B" else allowed.optimum


def _question(manifest: Manifest, vision: Tensor) -> dict[str, Tensor]:
    """Returns random text with the most rows, one of which is padding; one token is excluded."""
    generator = torch.Generator().manual_seed(0)
    num_images, num_tokens, width = vision.shape
    num_words = manifest.dimensions["M"].maximum
    text = torch.randn(num_images, num_words, width, generator=generator)
    text_mask = torch.ones(num_images, num_words, dtype=torch.bool)
    text_mask[:, 1:2] = False
    excluded = torch.zeros(num_images, num_tokens, dtype=torch.bool)
    excluded[:, 1:2] = True
    budget = (manifest.budget - torch.arange(num_images)).clamp(min=1)
    tile_grid = torch.tensor([1, num_images - 1])
    named = {tensor.name for tensor in manifest.inputs}
    return {name: value for name, value in (("budget", budget), ("tile_grid", tile_grid)) if name in named} | {
        "text": text.to(getattr(torch, manifest.input("text").dtype)),
        "text_mask": text_mask,
        "excluded": excluded,
    }
