from __future__ import annotations

from pathlib import Path

import pytest

from mmtok_deploy.dim_range import DimRange
from mmtok_export.artifact import export_model
from mmtok_export.selection_graph import build_selection
from mmtok_export.spec import SelectionSpec
from tests.exporters.graphs import spec_for
from tests.mmtok_deploy.problems import random_problem


@pytest.fixture(scope="session")
def spec() -> SelectionSpec:
    """Five tokens of 5 to 40, of one to three images."""
    return spec_for(
        random_problem(20),
        5,
        num_tokens=DimRange(5, 20, 40),
        num_words=DimRange(1, 3, 9),
        batch=DimRange(1, 1, 3),
    )


@pytest.fixture
def exported(spec: SelectionSpec, tmp_path: Path) -> Path:
    """A file of its own for each test: some break it."""
    path = tmp_path / "selection.onnx"
    export_model(build_selection(spec), path, "selection", spec)
    return path
