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
from mmtok_deploy.engines.tensorrt import compute_capability
from mmtok_deploy.greedy_replay import WrongPickError, replay_greedy
from mmtok_deploy.manifest import Check, Manifest, TensorInfo
from mmtok_deploy.problem import SelectionProblem

__all__ = ["CheckFailedError", "check_artifact"]

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
    """Returns the result of running a file's selection on synthetic features and replaying it in double precision.

    Smallest, optimal and largest sizes, each without and with padded text and excluded tokens. Every pick must gain
    the most after the picks before it, up to what float32 rounds (`greedy_replay.py`). The selection of a graph with
    an encoder is cut out of it first.

    Args:
        file: The file; it is what its manifest says.
        manifest: Its manifest.
        on_case: Called before each case with its sizes.

    Raises:
        CheckFailedError: Another token, another order, another value of coverage.
        EngineError: The file cannot run here, though it should.
    """
    obstacle = None if manifest.format == "onnx" else _obstacle_here(manifest)
    if obstacle is not None:
        return Check("not run", "", obstacle)
    device = torch.device("cpu" if manifest.format == "onnx" else "cuda")
    if manifest.kind == "selection":
        return _check_engine(open_engine(file, device), device, on_case)
    with tempfile.TemporaryDirectory() as folder:
        return _check_engine(_selection_alone(file, manifest, Path(folder)), device, on_case)


def _obstacle_here(manifest: Manifest) -> str | None:
    """Returns why an engine is not checked on this machine, None if it is."""
    if manifest.kind != "selection":
        return "an engine with an encoder is checked by its ONNX file alone"
    where = "run mmtok export check where the engine will run"
    if not torch.cuda.is_available():
        return f"no NVIDIA GPU was at hand: {where}"
    found, built_for = compute_capability(), manifest.details.get("compute_capabilities", [])
    if found not in built_for:
        return f"built for compute capability {', '.join(built_for)}, the GPU at hand has {found}: {where}"
    return None


def _check_engine(engine: Engine, device: torch.device, on_case: Callable[[str], None]) -> Check:
    dimensions = engine.manifest.dimensions
    sizes = dict.fromkeys(
        _Sizes(*(getattr(dimensions[name], which) for name in ("B", "N", "M")))
        for which in ("minimum", "optimum", "maximum")
    )
    num_picks = num_close = 0
    for case in sizes:
        for is_padded in (False, True):
            what = ", padding and excluded tokens" if is_padded else ""
            on_case(f"{case.batch} x {case.num_tokens} tokens, {case.num_words} words{what}")
            picks, close = _check_case(engine, case, device, is_padded)
            num_picks, num_close = num_picks + picks, num_close + close
    detail = f"{num_close} of them within rounding of the best" if num_close else "all equal"
    return Check("passed", engine.name, f"{num_picks} picks compared, {detail}")


def _check_case(engine: Engine, sizes: _Sizes, device: torch.device, is_padded: bool) -> tuple[int, int]:
    """Returns how many picks of the first and the last image were compared, and how many were close calls."""
    inputs = _features(engine.manifest, sizes, is_padded)
    outputs = engine.run({name: tensor.to(device) for name, tensor in inputs.items()})
    results = [
        _check_image(
            {name: tensor[image] for name, tensor in inputs.items()},
            {name: tensor[image].cpu() for name, tensor in outputs.items()},
            engine.manifest,
        )
        for image in sorted({0, sizes.batch - 1})
    ]
    return sum(picks for picks, _ in results), sum(close for _, close in results)


def _check_image(inputs: dict[str, Tensor], outputs: dict[str, Tensor], manifest: Manifest) -> tuple[int, int]:
    text = inputs["text"][inputs["text_mask"]]
    vision, excluded = inputs["vision"], inputs["excluded"]
    num_picks = min(manifest.budget, len(vision) - int(excluded.sum()))
    problem = SelectionProblem(vision, inputs["keys"], text, num_picks, excluded)
    order, missing = outputs["order"][:num_picks], outputs["order"][num_picks:]
    if (missing != -1).any():
        raise CheckFailedError(f"only {num_picks} tokens may be picked, got {outputs['order'].tolist()}")
    try:
        replay = replay_greedy(problem, manifest.constants, order.tolist())
    except WrongPickError as error:
        raise CheckFailedError(str(error)) from error
    kept = order.sort().values
    if outputs["kept"].tolist() != [*kept.tolist(), *missing.tolist()]:
        raise CheckFailedError(f"kept is not order sorted: {outputs['kept'].tolist()}, {order.tolist()}")
    if not torch.equal(outputs["visual_tokens"][:num_picks], vision[kept]):
        raise CheckFailedError("visual_tokens are not the rows that kept names")
    for name, found, wanted in (
        ("coverage", outputs["coverage"][:num_picks].double(), replay.coverage),
        ("total", outputs["total"].double(), replay.total),
    ):
        if not torch.allclose(found, wanted, rtol=_COVERAGE_TOLERANCE, atol=0):
            largest = ((found - wanted).abs() / wanted).max()
            raise CheckFailedError(
                f"{name} differs from double precision by {largest:.1e}, allowed {_COVERAGE_TOLERANCE}"
            )
    return num_picks, replay.num_close_calls


def _features(manifest: Manifest, sizes: _Sizes, is_padded: bool) -> dict[str, Tensor]:
    """Returns inputs like a model's: images of a few kinds of things, words that name some of them.

    If padded, every image has at least one row of padding and one excluded token, where it has more than one.
    """
    generator = torch.Generator().manual_seed(sizes.num_tokens)
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
    num_padding = (1 + (sizes.num_words // 3 + image)).clamp(max=sizes.num_words - 1) * is_padded
    num_excluded = (1 + (sizes.num_tokens // 8 + image)).clamp(max=sizes.num_tokens - 1) * is_padded
    inputs = {name: tensor.to(getattr(torch, manifest.input(name).dtype)) for name, tensor in features.items()}
    inputs |= {"text_mask": words >= num_padding, "excluded": tokens < num_excluded}
    if is_padded and sizes.num_tokens > 1:
        # What would be picked first, so that a graph which does not read `excluded` is found out.
        for one in {0, sizes.batch - 1}:
            text = inputs["text"][one][inputs["text_mask"][one]]
            matrix = coverage_matrix(inputs["vision"][one], inputs["keys"][one], text, manifest.constants)
            inputs["excluded"][one, matrix.sum(dim=0).argmax()] = True
    return inputs


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
