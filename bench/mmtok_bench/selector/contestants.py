"""The selections that are timed: the published loop, the backends, and exported graphs."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from mmtok_bench.selector.authors import AUTHORS, authors_selector
from mmtok_deploy.backends import BackendName, get_backend, reference
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.executors import Executor, make_executor
from mmtok_deploy.greedy_replay import WrongPickError, replay_greedy
from mmtok_deploy.problem import SelectionProblem

__all__ = ["BASELINES", "Contestant", "backends_on", "contestants", "first_wrong_pick"]

Contestant = Callable[[Sequence[SelectionProblem], SelectionConfig], list[Tensor]]
"""Returns the picks of each problem in a batch, in the order of picking; the authors' selector in raster order."""

_EXPORTED_FORMS = {"onnx-lazy": "lazy", "onnx-loop": "loop", "onnx-unrolled": "unrolled"}
_NOT_FOR_SPEED = ("reference", "blocked")
_BACKENDS = tuple(name for name in get_args(BackendName) if name != "auto")


def contestants(names: Sequence[str], device: torch.device, authors: Path | None = None) -> dict[str, Contestant]:
    """Returns the selections to time by name.

    Args:
        names: Names of selections; if empty, the published loop and the fast backends of the device.
        device: The device that they run on.
        authors: The file of the authors' own selector, to time it as well.

    Raises:
        ValueError: A name is unknown or cannot run on the device, or the file is not the authors'.
    """
    known = (*BASELINES, *_BACKENDS, *_EXPORTED_FORMS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"a backend to time is one of {', '.join(known)}, got {unknown[0]!r}")
    if not names:
        names = [*BASELINES, *(name for name in backends_on(device) if name not in _NOT_FOR_SPEED)]
    first: dict[str, Contestant] = {} if authors is None else {AUTHORS: authors_selector(authors)}
    return first | {name: _contestant(name, device) for name in names}


def backends_on(device: torch.device) -> list[str]:
    """Returns the names of the backends that run on a device."""
    found = []
    for name in _BACKENDS:
        with contextlib.suppress(ValueError):
            _contestant(name, device)
            found.append(name)
    return found


def first_wrong_pick(
    select: Contestant, problems: Sequence[SelectionProblem], config: SelectionConfig, *, in_order: bool = True
) -> str | None:
    """Returns an error in a selection's picks, in words; None if the picks are greedy up to float32 rounding.

    Args:
        select: The selection.
        problems: The problems to select from.
        config: The selection's constants.
        in_order: Whether the selection returns its picks in the order of picking. Otherwise, they must be the
            reference's tokens.
    """
    for problem, order in zip(problems, select(problems, config), strict=True):
        (expected,) = reference.select([problem], config)
        if not in_order:
            others = sorted(set(order.tolist()) ^ set(expected.kept.tolist()))
            if others:
                return f"it or the reference keeps token {others[0]}, not both"
            continue
        if torch.equal(order, expected.order):
            continue  # a replay in double precision takes seconds for thousands of tokens
        try:
            replay_greedy(problem, config, order.tolist())
        except WrongPickError as error:
            return str(error)
    return None


def _contestant(name: str, device: torch.device) -> Contestant:
    if name in BASELINES:
        return BASELINES[name]
    if name in _EXPORTED_FORMS:
        return _exported_graph(_EXPORTED_FORMS[name], device)
    backend = get_backend(next(each for each in get_args(BackendName) if each == name), device)
    return lambda problems, config: [selection.order for selection in backend(problems, config)]


def _dense_loop(matrix: Tensor, num_picks: int) -> Tensor:
    """Returns the picks [K] from C [M + N, N]; computes the gain of every token at every pick.

    Source: MMTok, arXiv 2508.18264, Algorithm 2, in the operations that its authors use.
    """
    covered = torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    picked = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    order = torch.zeros(num_picks, dtype=torch.int64, device=matrix.device)
    for pick in range(num_picks):
        gains = (matrix - covered.unsqueeze(1)).clamp(min=0).sum(dim=0)
        best = gains.masked_fill(picked, -float("inf")).argmax()
        order[pick] = best
        picked[best] = True
        covered = torch.maximum(covered, matrix[:, best])
    return order


def _baseline(loop: Callable[[Tensor, int], Tensor]) -> Contestant:
    @torch.no_grad()
    def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Tensor]:
        return [
            loop(coverage_matrix(problem.vision, problem.keys, problem.text, config), problem.num_picks)
            for problem in problems
        ]

    return select


def _scripted() -> Callable[[Tensor, int], Tensor]:
    with warnings.catch_warnings():
        # The authors compile with TorchScript, which PyTorch has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: Callable[[Tensor, int], Tensor] = torch.jit.script(_dense_loop)
    return scripted


BASELINES: dict[str, Contestant] = {"dense": _baseline(_dense_loop), "torchscript": _baseline(_scripted())}
"""The loop as PyTorch operations, and compiled by TorchScript as the authors do; no token may be excluded."""


def _exported_graph(form: str, device: torch.device) -> Contestant:
    """Returns a selection by graphs of this form; a graph is exported at the first call with problems of its sizes."""
    executors: dict[tuple[int, ...], Executor] = {}

    def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Tensor]:
        first = problems[0]
        key = (len(problems), len(first.vision), len(first.text), first.num_picks)
        if key not in executors:
            executors[key] = _export(form, problems, config, device)
        return [selection.order for selection in executors[key].select(problems)]

    return select


def _export(form: str, problems: Sequence[SelectionProblem], config: SelectionConfig, device: torch.device) -> Executor:
    # Only an exported graph needs ONNX.
    from mmtok_deploy.dim_range import DimRange
    from mmtok_export.artifact import export_model
    from mmtok_export.selection_graph import build_selection
    from mmtok_export.spec import FORMS, SelectionSpec

    first = problems[0]
    spec = SelectionSpec(
        budget=first.num_picks,
        num_tokens=DimRange.fixed(len(first.vision)),
        num_words=DimRange.fixed(len(first.text)),
        batch=DimRange(1, len(problems), len(problems)),
        vision_width=first.vision.shape[1],
        keys_width=first.keys.shape[1],
        dtype="float32",
        keys_dtype="float32",
        config=config,
        form=next(each for each in FORMS if each == form),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selection.onnx"
        export_model(build_selection(spec), path, "selection", spec)
        return make_executor("auto", device, config, path)
