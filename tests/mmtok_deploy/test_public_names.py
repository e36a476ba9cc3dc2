"""What users import stays where it is: a name that moves or goes is a change to be announced in the changelog."""

from __future__ import annotations

import importlib

import pytest

NAMES = {
    "mmtok_deploy": ["Budget", "Selection", "SelectionConfig", "SelectionError", "__version__", "select_tokens"],
    "mmtok_deploy.budget": ["Budget"],
    "mmtok_deploy.coverage": ["coverage_bound", "coverage_curve", "coverage_matrix"],
    "mmtok_deploy.engines": ["Engine", "EngineError", "open_engine"],
    "mmtok_deploy.greedy_replay": ["WrongPickError", "replay_greedy"],
    "mmtok_deploy.methods": ["MethodName", "comparator"],
    "mmtok_deploy.presets": ["PRESETS"],
    "mmtok_deploy.problem": ["Selection", "SelectionProblem"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_there_and_public(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module] if not hasattr(found, name) or name not in found.__all__]
    assert missing == []
    if module == "mmtok_deploy":
        assert sorted(found.__all__) == NAMES[module]
