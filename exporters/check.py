"""Holding an exported selection against the float32 reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.engines import Engine, open_engine
from mmtok_deploy.manifest import Check, Manifest, TensorInfo
from mmtok_deploy.selection import select_tokens

__all__ = ["CheckFailedError", "check_artifact"]

# Two gains closer than this, relative, may be ordered either way in float32: what comes after is not compared.
_CLOSE_CALL = 1e-5
# Relative. Matrix products and sums of thousands of terms, in another order; 1.1e-5 was seen.
_COVERAGE_TOLERANCE = 1e-4
_NUM_CLUSTERS = 24


class CheckFailedError(Exception):
    """An exported file whose answer is not the reference's."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    batch: int
    num_tokens: int
    num_words: int


def check_artifact(file: Path, manifest: Manifest, *, on_case: Callable[[str], None] = lambda _: None) -> Check:
    """Returns the result of running a file's selection on made-up features beside the reference.

    Smallest, optimal and largest sizes; padded text and excluded tokens in every batch of more than one image, and in
    one of one image. The selection of a graph with an encoder is cut out of it first.

    Args:
        file: The file; it is what its manifest says.
        manifest: Its manifest.
        on_case: Called before each case with its sizes.

    Raises:
        CheckFailedError: Another token, another order, another value of coverage.
        EngineError: The file cannot run here, though it should.
    """
    if manifest.format != "onnx" and not torch.cuda.is_available():
        return Check("not run", "", "no NVIDIA GPU was at hand: run mmtok export check where the engine will run")
    if manifest.format != "onnx" and manifest.kind != "selection":
        return Check("not run", "", "an engine with an encoder is checked by its ONNX file alone")
    device = torch.device("cpu" if manifest.format == "onnx" else "cuda")
    if manifest.kind == "selection":
        return _check_engine(open_engine(file, device), device, on_case)
    with tempfile.TemporaryDirectory() as folder:
        return _check_engine(_selection_alone(file, manifest, Path(folder)), device, on_case)


def _check_engine(engine: Engine, device: torch.device, on_case: Callable[[str], None]) -> Check:
    dimensions = engine.manifest.dimensions
    cases = [
        _Sizes(*(getattr(dimensions[name], which) for name in ("B", "N", "M")))
        for which in ("minimum", "optimum", "maximum")
    ]
    num_compared = num_picks = 0
    for seed, sizes in enumerate(dict.fromkeys(cases)):
        on_case(f"{sizes.batch} x {sizes.num_tokens} tokens, {sizes.num_words} words")
        compared = _check_case(engine, sizes, device, seed)
        num_compared += sum(compared)
        num_picks += len(compared) * engine.manifest.budget
    if num_compared < num_picks / 2:
        raise CheckFailedError(f"only {num_compared} of {num_picks} picks could be compared, the rest are close calls")
    return Check("passed", engine.name, f"{num_compared} of {num_picks} picks compared, all equal")


def _check_case(engine: Engine, sizes: _Sizes, device: torch.device, seed: int) -> list[int]:
    """Returns how many picks of the first and the last image were compared."""
    inputs = _features(engine.manifest, sizes, seed)
    outputs = engine.run({name: tensor.to(device) for name, tensor in inputs.items()})
    return [
        _check_image(
            {name: tensor[image] for name, tensor in inputs.items()},
            {name: tensor[image].cpu() for name, tensor in outputs.items()},
            engine.manifest,
        )
        for image in sorted({0, sizes.batch - 1})
    ]


def _check_image(inputs: dict[str, Tensor], outputs: dict[str, Tensor], manifest: Manifest) -> int:
    text = inputs["text"][inputs["text_mask"]]
    vision, keys, excluded = inputs["vision"], inputs["keys"], inputs["excluded"]
    expected = select_tokens(
        vision, keys, text, manifest.budget, config=manifest.constants, excluded=excluded, backend="reference"
    )
    order = outputs["order"]
    # A budget of all tokens ends with the excluded ones in the reference, in a graph with -1.
    num_expected = min(len(expected), len(vision) - int(excluded.sum()))
    if (order[num_expected:] != -1).any():
        raise CheckFailedError(f"only {num_expected} tokens may be picked, got {order.tolist()}")
    differs = (order[:num_expected] != expected.order).nonzero()
    num_equal = int(differs[0]) if len(differs) else num_expected
    if num_equal < num_expected:
        matrix = coverage_matrix(vision, keys, text, manifest.constants)
        _check_close_call(matrix, expected.order[:num_equal], int(expected.order[num_equal]), int(order[num_equal]))
    kept = order[order >= 0].sort().values
    if outputs["kept"].tolist() != kept.tolist() + [-1] * (manifest.budget - len(kept)):
        raise CheckFailedError(f"kept is not order sorted: {outputs['kept'].tolist()}, {order.tolist()}")
    if not torch.equal(outputs["visual_tokens"][: len(kept)], vision[kept]):
        raise CheckFailedError("visual_tokens are not the rows that kept names")
    for name, found, wanted in (
        ("coverage", outputs["coverage"][:num_equal], expected.coverage[:num_equal]),
        ("total", outputs["total"], expected.total),
    ):
        if not torch.allclose(found, wanted, rtol=_COVERAGE_TOLERANCE, atol=0):
            error = ((found - wanted).abs() / wanted).max()
            raise CheckFailedError(f"{name} differs from the reference by {error:.1e}, allowed {_COVERAGE_TOLERANCE}")
    return num_equal


def _check_close_call(matrix: Tensor, picked: Tensor, expected: int, found: int) -> None:
    covered = matrix[:, picked].amax(dim=1, keepdim=True) if len(picked) else matrix.new_zeros(len(matrix), 1)
    best, other = ((matrix[:, [each]] - covered).clamp_min(0).double().sum() for each in (expected, found))
    if found in picked.tolist() or best - other > _CLOSE_CALL * best:
        raise CheckFailedError(f"pick {len(picked)} is token {found}, expected {expected}")


def _features(manifest: Manifest, sizes: _Sizes, seed: int) -> dict[str, Tensor]:
    """Returns inputs like a model's: images of a few kinds of things, words that name some of them."""
    generator = torch.Generator().manual_seed(seed)
    widths = {name: int(manifest.input(name).shape[-1]) for name in ("vision", "keys")}
    kinds = {name: torch.randn(_NUM_CLUSTERS, width, generator=generator) for name, width in widths.items()}
    which = torch.randint(_NUM_CLUSTERS, (sizes.batch, sizes.num_tokens), generator=generator)
    features = {
        name: kinds[name][which] + torch.randn(sizes.batch, sizes.num_tokens, width, generator=generator)
        for name, width in widths.items()
    }
    named = torch.randint(_NUM_CLUSTERS, (sizes.batch, sizes.num_words), generator=generator)
    noise = torch.randn(sizes.batch, sizes.num_words, widths["vision"], generator=generator)
    features["text"] = 0.3 * kinds["vision"][named] + noise
    image = torch.arange(sizes.batch)[:, None]
    tokens, words = torch.arange(sizes.num_tokens), torch.arange(sizes.num_words)
    # The image's place in its batch and the case decide how much of it is padding and excluded.
    num_padding = (sizes.num_words // 3 * ((image + seed) % 3)).clamp(max=sizes.num_words)
    num_excluded = (sizes.num_tokens // 8 * ((image + seed) % 2)).clamp(max=sizes.num_tokens)
    inputs = {name: tensor.to(getattr(torch, manifest.input(name).dtype)) for name, tensor in features.items()}
    return inputs | {"text_mask": words >= num_padding, "excluded": tokens < num_excluded}


def _selection_alone(file: Path, manifest: Manifest, folder: Path) -> Engine:
    """Returns the selection cut out of a graph with an encoder, running on the CPU."""
    from mmtok_deploy.engines.onnxruntime import OnnxRuntimeEngine

    edges = manifest.details["edges"]
    model = ir.load(file)
    others, outputs = ["text", "text_mask", "excluded"], ["kept", "order", "visual_tokens", "coverage", "total"]
    graph = ir.convenience.extract(model.graph, [*(edge["name"] for edge in edges.values()), *others], outputs)
    for value, name in zip(graph.inputs, edges, strict=False):
        value.name = name
    alone = folder / "selection.onnx"
    ir.save(ir.Model(graph, ir_version=model.ir_version), alone)
    tensors = {tensor.name: tensor for tensor in (*manifest.inputs, *manifest.outputs)}
    features = [TensorInfo(name, edge["dtype"], ("B", "N", edge["width"])) for name, edge in edges.items()]
    described = replace(
        manifest,
        inputs=(*features, *(tensors[name] for name in others)),
        outputs=tuple(tensors[name] for name in outputs),
    )
    return OnnxRuntimeEngine(alone, described, torch.device("cpu"))
