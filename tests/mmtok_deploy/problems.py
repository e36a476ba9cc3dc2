"""Selection problems to test with: the golden ones, and small random ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from mmtok_deploy import Selection, SelectionConfig, select_tokens
from mmtok_deploy.backends import BackendName
from mmtok_deploy.greedy_replay import GreedyReplay, replay_greedy
from mmtok_deploy.problem import SelectionProblem
from mmtok_deploy.selection import BudgetLike

__all__ = [
    "BACKEND",
    "CPU_BACKENDS",
    "GOLDEN_DIR",
    "GOLDEN_NAMES",
    "Golden",
    "Problem",
    "assert_greedy",
    "golden",
    "mask_of",
    "problems",
    "random_problem",
    "using_backend",
]

CPU_BACKENDS: tuple[BackendName, ...] = ("reference", "lazy")
BACKEND: ContextVar[BackendName] = ContextVar("BACKEND", default="auto")
"""What `Problem.select` selects with; `using_backend` sets it for a while."""

GOLDEN_DIR = Path(__file__).parents[1] / "data" / "golden"
GOLDEN_NAMES = sorted(path.stem for path in GOLDEN_DIR.glob("*.npz"))


@dataclass(frozen=True)
class Problem:
    """The features of one image and one question."""

    vision: Tensor
    keys: Tensor
    text: Tensor
    excluded: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vision)

    def select(self, budget: BudgetLike, config: SelectionConfig = SelectionConfig()) -> Selection:
        return select_tokens(
            self.vision, self.keys, self.text, budget, config=config, excluded=self.excluded, backend=BACKEND.get()
        )

    def take(self, tokens: Tensor) -> Problem:
        """Returns the problem whose token i is this one's token `tokens[i]`."""
        excluded = None if self.excluded is None else self.excluded[tokens]
        return Problem(self.vision[tokens], self.keys[tokens], self.text, excluded)

    def picking(self, num_picks: int, device: str = "cpu") -> SelectionProblem:
        """Returns the problem as a backend is given it: of the tokens that may be picked, at most `num_picks`."""
        vision, keys, text = (tensor.to(device) for tensor in (self.vision, self.keys, self.text))
        excluded = None if self.excluded is None else self.excluded.to(device)
        num_pickable = len(self) - (0 if excluded is None else int(excluded.sum()))
        return SelectionProblem(vision, keys, text, min(num_picks, num_pickable), excluded)

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(self.vision.to(dtype), self.keys.to(dtype), self.text.to(dtype), self.excluded)


@dataclass(frozen=True)
class Golden:
    """A problem with the published selector's answer."""

    problem: Problem
    config: SelectionConfig
    budget: int
    order: list[int]
    kept: list[int]

    def given(self, device: str = "cpu") -> SelectionProblem:
        """Returns the problem as a backend is given it."""
        return self.problem.picking(self.budget, device)


def assert_greedy(
    selection: Selection, problem: SelectionProblem, config: SelectionConfig = SelectionConfig()
) -> GreedyReplay:
    """Returns the replay of a backend's answer, which is greedy up to what float32 rounds, in all its fields."""
    assert (selection.order.dtype, selection.kept.dtype) == (torch.int64, torch.int64)
    assert (selection.coverage.dtype, selection.total.dtype) == (torch.float32, torch.float32)
    replay = replay_greedy(problem, config, selection.order.tolist())
    assert selection.kept.tolist() == sorted(selection.order.tolist())
    assert (selection.coverage.diff() >= 0).all()
    # An entry of C is good to 6e-5 at a temperature of 0.01 (greedy_replay.py).
    torch.testing.assert_close(selection.coverage.double(), replay.coverage, rtol=1e-4, atol=0)
    torch.testing.assert_close(selection.total.double(), replay.total, rtol=1e-4, atol=0)
    return replay


@contextmanager
def using_backend(name: BackendName) -> Iterator[None]:
    token = BACKEND.set(name)
    yield
    BACKEND.reset(token)


@functools.cache
def golden(name: str) -> Golden:
    with np.load(GOLDEN_DIR / f"{name}.npz") as file:
        case = {key: file[key] for key in file.files}
    excluded = mask_of(case["excluded"].tolist(), len(case["vision"])) if case["excluded"].size else None
    features = {key: torch.from_numpy(case[key]) for key in ("vision", "keys", "text")}
    tv_temp, vv_temp, alpha = (float(case[key]) for key in ("tv_temp", "vv_temp", "alpha"))
    return Golden(
        problem=Problem(**features, excluded=excluded),
        config=SelectionConfig(tv_temp, vv_temp, alpha),
        budget=int(case["k"]),
        order=case["order"].tolist(),
        kept=case["kept"].tolist(),
    )


def mask_of(tokens: list[int], num_tokens: int) -> Tensor:
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    mask[tokens] = True
    return mask


def random_problem(num_tokens: int, num_words: int = 3, excluded: list[int] | None = None, seed: int = 0) -> Problem:
    """Returns gaussian features, whose gains are as good as never close to each other."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_tokens, 8), (num_tokens, 6), (num_words, 8))
    vision, keys, text = (torch.randn(shape, generator=generator) for shape in shapes)
    return Problem(vision, keys, text, None if excluded is None else mask_of(excluded, num_tokens))


@st.composite
def problems(draw: st.DrawFn, *, min_words: int = 0, may_exclude: bool = False) -> Problem:
    num_tokens = draw(st.integers(1, 10))
    excluded = draw(st.lists(st.integers(0, num_tokens - 1), unique=True)) if may_exclude else None
    return random_problem(num_tokens, draw(st.integers(min_words, 4)), excluded, draw(st.integers(0, 2**16)))
