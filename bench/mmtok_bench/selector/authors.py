"""Loads the authors' own selector from a file of their repository, which is not part of this one."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.problem import SelectionProblem

__all__ = ["AUTHORS", "authors_selector"]

AUTHORS = "authors"
"""The backend's name in rows."""

_CLASS, _METHOD = "SemanticTokenSelector", "mm_coverage_selection"


def authors_selector(path: Path) -> Callable[[Sequence[SelectionProblem], SelectionConfig], list[Tensor]]:
    """Returns the selection that the file `mmtok/core/semantic_selector.py` of the authors' repository implements.

    The selection handles one problem after another, and returns the kept tokens of each in raster order.

    Args:
        path: The file, whose code is run.

    Raises:
        ValueError: The file cannot be imported, or is not the authors'.
    """
    module = _imported(path)
    selector: Any = getattr(module, _CLASS, None)
    if not hasattr(selector, _METHOD):
        raise ValueError(
            f"--authors takes mmtok/core/semantic_selector.py of the authors' repository, {path} has no "
            f"{_CLASS}.{_METHOD}"
        )

    @torch.no_grad()
    def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Tensor]:
        temps = {"tv_temp": config.tv_temp, "vv_temp": config.vv_temp}
        selected = []
        for problem in problems:
            of_budget = selector(target_vision_tokens=problem.num_picks, alpha=config.alpha)
            kept, _ = of_budget.mm_coverage_selection(problem.text, problem.vision, problem.keys, **temps)
            selected.append(torch.tensor(list(kept)))
        return selected

    return select


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("authors_selector", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--authors takes a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            # The authors compile with TorchScript, which PyTorch has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
