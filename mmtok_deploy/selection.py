"""The selection: which vision tokens the language model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from mmtok_deploy.backends import BackendName, get_backend
from mmtok_deploy.budget import Budget
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_curve, coverage_matrix
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["BudgetLike", "SelectionError", "select_tokens"]

BudgetLike = Budget | int | float | str


class SelectionError(ValueError):
    """Features that no selection can be made from (NaN or infinite values)."""


@overload
def select_tokens(
    vision: Tensor,
    keys: Tensor,
    text: Tensor,
    budget: BudgetLike,
    *,
    config: SelectionConfig = ...,
    excluded: Tensor | None = ...,
    backend: BackendName = ...,
) -> Selection: ...


@overload
def select_tokens(
    vision: Sequence[Tensor],
    keys: Sequence[Tensor],
    text: Sequence[Tensor],
    budget: BudgetLike | Sequence[BudgetLike],
    *,
    config: SelectionConfig = ...,
    excluded: Sequence[Tensor | None] | None = ...,
    backend: BackendName = ...,
) -> list[Selection]: ...


def select_tokens(
    vision: Tensor | Sequence[Tensor],
    keys: Tensor | Sequence[Tensor],
    text: Tensor | Sequence[Tensor],
    budget: BudgetLike | Sequence[BudgetLike],
    *,
    config: SelectionConfig = SelectionConfig(),
    excluded: Tensor | Sequence[Tensor | None] | None = None,
    backend: BackendName = "auto",
) -> Selection | list[Selection]:
    """Returns the vision tokens that best cover the text and the image: MMTok's greedy maximum coverage.

    One problem is given as tensors; a batch as lists of tensors, one a problem, whose N, M and budgets may differ.
    All arithmetic is float32. Tokens whose gains differ by less than float32 rounding, such as equal tokens, are picked
    in either order, which may depend on the processor and the number of threads. Without text (M = 0) the image alone
    is covered.

    Args:
        vision: [N, D] vision tokens after the projector, float32, float16 or bfloat16.
        keys: [N, d] vision features before the projector, one a token.
        text: [M, D] language-model input embeddings of the guidance words.
        budget: Tokens to keep: a Budget or what `Budget.parse` reads. For a batch, one for all or one a problem.
        config: Temperatures, weight, coverage.
        excluded: [N] bool, tokens never to pick, such as padding. If fewer tokens than the budget remain, those are
            returned; a budget of N or more returns every token untouched (`order` then ends with the excluded ones).
        backend: Name of the backend. Backends differ in speed, and pick the same tokens except for gains that close.

    Raises:
        TypeError: Tensors and lists mixed, or a dtype that is not one of the three.
        ValueError: Shapes that do not belong together, lists of different lengths, a budget that is not understood,
            coverage "text" without text, or a backend that cannot run where the features are.
        SelectionError: NaN or infinite features, or a Triton kernel that gave up.

    Source: MMTok (ICLR 2026), arXiv 2508.18264, Algorithms 1 and 2.
    """
    if isinstance(vision, Tensor):
        if not (isinstance(keys, Tensor) and isinstance(text, Tensor)):
            raise TypeError("vision, keys and text are three tensors, or three lists of tensors")
        if not (excluded is None or isinstance(excluded, Tensor)):
            raise TypeError(f"excluded is a tensor or None for one problem, got {type(excluded).__name__}")
        budgets = [_one_budget(budget)]
        return _select([vision], [keys], [text], budgets, [excluded], config, backend)[0]

    if isinstance(keys, Tensor) or isinstance(text, Tensor) or isinstance(excluded, Tensor):
        raise TypeError("vision is a list of tensors, so keys, text and excluded are lists as well")
    num_problems = len(vision)
    if isinstance(budget, Sequence) and not isinstance(budget, str):
        budgets = [_one_budget(one) for one in budget]
    else:
        budgets = [_one_budget(budget)] * num_problems
    masks = [None] * num_problems if excluded is None else list(excluded)
    lengths = {"keys": len(keys), "text": len(text), "budget": len(budgets), "excluded": len(masks)}
    for name, length in lengths.items():
        if length != num_problems:
            raise ValueError(f"a batch of {num_problems} problems needs as many {name}, got {length}")
    return _select(vision, keys, text, budgets, masks, config, backend)


def _one_budget(budget: object) -> Budget:
    if not isinstance(budget, Budget | int | float | str):
        raise TypeError(f"one problem takes one budget, got {type(budget).__name__}")
    return Budget.parse(budget)


def _select(
    vision: Sequence[Tensor],
    keys: Sequence[Tensor],
    text: Sequence[Tensor],
    budgets: Sequence[Budget],
    masks: Sequence[Tensor | None],
    config: SelectionConfig,
    backend: BackendName,
) -> list[Selection]:
    problems = []
    for x, c, t, budget, mask in zip(vision, keys, text, budgets, masks, strict=True):
        _check_problem(x, c, t, config, mask)
        may_be_picked = len(x) if mask is None else len(x) - int(mask.sum())
        problems.append(SelectionProblem(x, c, t, min(budget.num_kept(len(x)), may_be_picked), mask))
    device = vision[0].device if len(vision) else torch.device("cpu")
    selections = get_backend(backend, device)(problems, config)
    for idx, (problem, budget) in enumerate(zip(problems, budgets, strict=True)):
        if not torch.isfinite(selections[idx].total):
            raise SelectionError(_why_not_finite(problem))
        if budget.num_kept(len(problem.vision)) == len(problem.vision) and problem.excluded is not None:
            selections[idx] = _every_token(selections[idx], problem, config)
    return selections


def _why_not_finite(problem: SelectionProblem) -> str:
    if all(bool(torch.isfinite(each).all()) for each in (problem.vision, problem.keys, problem.text)):
        return (
            "the coverage is not finite though the features are: their norms are too large for float32, or the "
            "programs of a Triton kernel did not run at once on this GPU: choose backend 'reference'"
        )
    return "vision, keys and text must be finite, got NaN or infinite values"


def _every_token(selection: Selection, problem: SelectionProblem, config: SelectionConfig) -> Selection:
    """Returns the selection with the excluded tokens added at its end."""
    assert problem.excluded is not None
    order = torch.cat([selection.order, problem.excluded.nonzero()[:, 0]])
    matrix = coverage_matrix(problem.vision, problem.keys, problem.text, config)
    return Selection(order, order.sort().values, coverage_curve(matrix, order), selection.total)


def _check_problem(
    vision: Tensor, keys: Tensor, text: Tensor, config: SelectionConfig, excluded: Tensor | None
) -> None:
    for name, tensor in (("vision", vision), ("keys", keys), ("text", text)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a tensor or a list of tensors, got {type(tensor).__name__}")
        if tensor.ndim != 2:
            raise ValueError(f"{name} is a matrix, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name} is float32, float16 or bfloat16, got {tensor.dtype}")
    if len(keys) != len(vision):
        raise ValueError(f"keys has one row a vision token: expected {len(vision)}, got {len(keys)}")
    if text.shape[1] != vision.shape[1]:
        raise ValueError(f"text and vision have the same width, got {text.shape[1]} and {vision.shape[1]}")
    if config.coverage == "text" and not len(text):
        raise ValueError("coverage 'text' needs at least one row of text; use 'multimodal' or 'vision' without")
    if excluded is not None and (excluded.dtype != torch.bool or excluded.shape != vision.shape[:1]):
        raise ValueError(f"excluded is a bool mask of [{len(vision)}], got {excluded.dtype} of {list(excluded.shape)}")
