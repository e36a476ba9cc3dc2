"""Compares an exported selection with the float32 reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.engines import Engine, open_engine
from mmtok_deploy.engines.onnxruntime import OnnxRuntimeEngine
from mmtok_deploy.engines.tensorrt import compute_capability
from mmtok_deploy.manifest import ArtifactError, Check, Manifest, TensorInfo
from mmtok_deploy.synthetic import synthetic_features
from mmtok_export.graph_file import load_graph
from mmtok_export.picks import CheckFailedError, Compared, hold_image
from mmtok_export.whole_graph import SELECTION_INPUTS, SELECTION_OUTPUTS, CannotRunError, Encoder, check_whole_graph

__all__ = ["CheckFailedError", "check_artifact", "estimated_seconds"]


@dataclass(frozen=True, slots=True)
class _Sizes:
    batch: int
    num_tokens: int
    num_words: int


def check_artifact(
    file: Path,
    manifest: Manifest,
    *,
    encoder: Encoder | None = None,
    features: dict[str, Tensor] | None = None,
    on_case: Callable[[str], None] = lambda _: None,
) -> Check:
    """Returns the result of running a file's selection on synthetic features and replaying it in double precision.

    The cases are the smallest, optimal and largest sizes, each with and without padded text and excluded tokens. Every
    pick must have the largest gain after the earlier picks, up to float32 rounding (`greedy_replay.py`). For a graph
    with an encoder, the selection is extracted first; then the whole graph runs once on photographs, if the CPU can
    run it.

    Args:
        file: The file.
        manifest: Its manifest.
        encoder: Runs the original encoder, with whose features those of the graph are compared.
        features: The user's features, instead of synthetic ones and photographs: inputs of the selection, or of the
            whole graph. Without `text_mask`, all rows of text count; without `excluded`, no token is excluded.
        on_case: Called before each case with its sizes.

    Raises:
        CheckFailedError: A token, the order or a coverage value differs; or the encoder's features are not finite, or
            differ from those of `encoder`.
        ArtifactError: The file is not the one that its manifest describes.
        EngineError: The file does not run on this machine, although it should.
        ValueError: `features` are neither the inputs of the selection nor those of the whole graph.
    """
    obstacle = None if manifest.format == "onnx" else _obstacle_here(manifest)
    if obstacle is not None:
        return Check("not run", "", obstacle)
    device = torch.device("cpu" if manifest.format == "onnx" else "cuda")
    engine = open_engine(file, device) if manifest.kind == "selection" else _selection_alone(file, manifest)
    given = None if features is None else _given(manifest, engine.manifest, features)
    if given is None or not given.keys() - _names(engine.manifest):
        check = _check_engine(engine, device, given, on_case)
        if manifest.kind == "selection":
            return check
        if given is not None:
            return replace(check, status="selection only")
    else:
        check = Check("passed", engine.name, "")
    on_case("the whole graph")
    try:
        whole = check_whole_graph(file, manifest, encoder, given)
    except CannotRunError as error:
        why = " ".join(str(error).split())
        return Check("selection only", check.runtime, f"{check.detail}; the whole graph did not run: {why}")
    return replace(check, detail="; ".join(filter(None, (check.detail, whole))))


def estimated_seconds(manifest: Manifest) -> float:
    """Returns the approximate seconds of `check_artifact` on this machine, from the time of a matrix product."""
    side = 384
    square = torch.randn(side, side)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(square, square)
        times.append(time.perf_counter() - started)
    # The fastest run is the one that other programs disturbed least.
    seconds_per_term = min(times) / side**3
    batch, num_tokens = (manifest.dimensions[name].maximum for name in ("B", "N"))
    width = (
        sum(int(edge["width"]) for edge in manifest.details["edges"].values())
        if "edges" in manifest.details
        else (sum(int(manifest.input(name).shape[-1]) for name in ("vision", "keys")))
    )
    # Each case: the graph's product and two in double precision; passes over the matrix; all gains of a loop.
    product = 8 * num_tokens**2 * width * seconds_per_term
    passes = num_tokens**2 * 1e-8 * (20 + (0 if manifest.form == "lazy" else manifest.budget))
    return 2 * min(batch, 2) * (product + passes)


def _given(manifest: Manifest, selection: Manifest, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the user's features as inputs of the selection or of the whole graph, in the dtypes of the inputs.

    Raises:
        ValueError: The features are inputs of neither or not finite, or conversion to the dtype would round them.
    """
    of_selection = {"text_mask", "excluded", "budget"}
    optional = set(of_selection)
    for described in (selection, manifest):
        names = _names(described)
        if described.kind != "selection" and described is manifest:
            optional |= {"text", "tile_grid"}
        if not names - optional <= features.keys() or not features.keys() <= names:
            continue
        inputs = {}
        for name, tensor in features.items():
            if not tensor.double().isfinite().all():
                raise ValueError(f"{name} has values that are not finite: expected an encoder's features")
            inputs[name] = tensor.to(getattr(torch, described.input(name).dtype))
            if not torch.equal(inputs[name].to(tensor.dtype), tensor):
                raise ValueError(f"{name} is {tensor.dtype}, and the file takes {described.input(name).dtype}: rounded")
        if "text" in inputs:
            inputs.setdefault("text_mask", torch.ones(inputs["text"].shape[:2], dtype=torch.bool))
        if "vision" in inputs:
            inputs.setdefault("excluded", torch.zeros(inputs["vision"].shape[:2], dtype=torch.bool))
            if described.takes_budget:
                inputs.setdefault("budget", torch.full((len(inputs["vision"]),), described.budget))
        return inputs
    expected = [", ".join(sorted(_names(selection) - of_selection))]
    if manifest.kind != "selection":
        expected.append(", ".join(sorted(_names(manifest) - optional)))
    left_out = sorted((_names(selection) | _names(manifest)) & optional)
    raise ValueError(
        f"--features holds {', '.join(features)}: expected {'; or '.join(expected)}; {', '.join(left_out)} may be given"
    )


def _names(manifest: Manifest) -> set[str]:
    return {tensor.name for tensor in manifest.inputs}


def _obstacle_here(manifest: Manifest) -> str | None:
    """Returns the reason why an engine is not checked on this machine; None if it is checked."""
    if manifest.kind != "selection":
        return "an engine with an encoder is checked by its ONNX file alone"
    where = "run mmtok export check where the engine will run"
    if not torch.cuda.is_available():
        return f"no NVIDIA GPU was at hand: {where}"
    found, built_for = compute_capability(), manifest.details.get("compute_capabilities", [])
    if found not in built_for:
        return f"built for compute capability {', '.join(built_for)}, the GPU at hand has {found}: {where}"
    return None


def _check_engine(
    engine: Engine, device: torch.device, given: dict[str, Tensor] | None, on_case: Callable[[str], None]
) -> Check:
    compared = Compared()
    if given is not None:
        _check_case(engine, given, device, compared)
        return Check("passed", engine.name, f"of the given features, {compared}")
    dimensions = engine.manifest.dimensions
    sizes = dict.fromkeys(
        _Sizes(*(getattr(dimensions[name], which) for name in ("B", "N", "M")))
        for which in ("minimum", "optimum", "maximum")
    )
    for case in sizes:
        for is_padded in (False, True):
            what = ", padding and excluded tokens" if is_padded else ""
            on_case(f"{case.batch} x {case.num_tokens} tokens, {case.num_words} words{what}")
            _check_case(engine, _features(engine.manifest, case, is_padded), device, compared)
    return Check("passed", engine.name, str(compared))


def _check_case(engine: Engine, inputs: dict[str, Tensor], device: torch.device, compared: Compared) -> None:
    """Compares the selections of the first and the last image with the reference."""
    outputs = engine.run({name: tensor if name == "budget" else tensor.to(device) for name, tensor in inputs.items()})
    for image in sorted({0, len(inputs["vision"]) - 1}):
        replay = hold_image(
            {name: tensor[image] for name, tensor in inputs.items()},
            {name: tensor[image].cpu() for name, tensor in outputs.items()},
            engine.manifest,
        )
        compared.add(replay)


def _features(manifest: Manifest, sizes: _Sizes, is_padded: bool) -> dict[str, Tensor]:
    """Returns synthetic inputs: images that show a few kinds of things, and words that name some of these.

    If `is_padded`, every image has at least one row of padding and one excluded token, unless it has only one row or
    token.
    """
    widths = [int(manifest.input(name).shape[-1]) for name in ("vision", "keys")]
    images = [
        synthetic_features(sizes.num_tokens, sizes.num_words, *widths, seed=image) for image in range(sizes.batch)
    ]
    features = {
        name: torch.stack(tensors)
        for name, tensors in zip(("vision", "keys", "text"), zip(*images, strict=True), strict=True)
    }
    image = torch.arange(sizes.batch)[:, None]
    tokens, words = torch.arange(sizes.num_tokens), torch.arange(sizes.num_words)
    num_padding = (1 + (sizes.num_words // 3 + image)).clamp(max=sizes.num_words - 1) * is_padded
    num_excluded = (1 + (sizes.num_tokens // 8 + image)).clamp(max=sizes.num_tokens - 1) * is_padded
    inputs = {name: tensor.to(getattr(torch, manifest.input(name).dtype)) for name, tensor in features.items()}
    inputs |= {"text_mask": words >= num_padding, "excluded": tokens < num_excluded}
    if manifest.takes_budget:
        inputs["budget"] = (manifest.budget - is_padded - image[:, 0]).clamp(min=1)
    if is_padded and sizes.num_tokens > 1:
        # The token that would be picked first, so that a graph that ignores `excluded` fails.
        for one in {0, sizes.batch - 1}:
            text = inputs["text"][one][inputs["text_mask"][one]]
            matrix = coverage_matrix(inputs["vision"][one], inputs["keys"][one], text, manifest.constants)
            inputs["excluded"][one, matrix.sum(dim=0).argmax()] = True
    return inputs


def _selection_alone(file: Path, manifest: Manifest) -> Engine:
    """Returns an engine on the CPU of the selection that is extracted from a graph with an encoder."""
    if "edges" not in manifest.details:
        raise ArtifactError(
            f'{file.name}.json says the kind "{manifest.kind}", and does not name the features of an encoder: they do '
            "not belong together, export it again"
        )
    edges = manifest.details["edges"]
    model = load_graph(file, manifest)
    others = [name for name in SELECTION_INPUTS if name in _names(manifest)]
    graph = ir.convenience.extract(
        model.graph, [*(edge["name"] for edge in edges.values()), *others], list(SELECTION_OUTPUTS)
    )
    for value, name in zip(graph.inputs, edges, strict=False):
        value.name = name
    alone = ir.external_data.load_to_model(ir.Model(graph, ir_version=model.ir_version))
    tensors = {tensor.name: tensor for tensor in (*manifest.inputs, *manifest.outputs)}
    batch, num_tokens = tensors["excluded"].shape
    features = [TensorInfo(name, edge["dtype"], (batch, num_tokens, edge["width"])) for name, edge in edges.items()]
    described = replace(
        manifest,
        kind="selection",
        inputs=(*features, *(tensors[name] for name in others)),
        outputs=tuple(tensors[name] for name in SELECTION_OUTPUTS),
    )
    alone.metadata_props.update(described.metadata())
    content = ir.to_proto(alone).SerializeToString()
    return OnnxRuntimeEngine(file, described, torch.device("cpu"), None, content)
