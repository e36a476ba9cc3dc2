from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtok_deploy.bench.results import SCHEMA, append_row, make_row, new_result_file, read_rows

CPU = torch.device("cpu")
ROW = make_row("selector", {"num_tokens": 9, "batch": 1}, "lazy", [5.0, 1.0, 2.0, 3.0, 4.0, 6.0], CPU)


def test_a_row_has_the_quantiles_and_says_where_it_comes_from() -> None:
    assert (ROW.p20_ms, ROW.p50_ms, ROW.p80_ms, ROW.num_runs) == (2.0, 3.5, 5.0, 6)
    assert ROW.schema == SCHEMA
    assert ROW.versions["torch"] == torch.__version__
    assert ROW.device
    assert ROW.time.endswith("+00:00")


def test_rows_are_appended_and_read_back(tmp_path: Path) -> None:
    path = new_result_file(tmp_path / "new", "selector")
    rows = [ROW, replace(ROW, backend="dense")]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    assert all(json.loads(line)["case"]["num_tokens"] == 9 for line in path.read_text().splitlines())


def test_an_older_file_is_never_taken(tmp_path: Path) -> None:
    paths = {new_result_file(tmp_path, "selector") for _ in range(5)}
    assert len(paths) == 5


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, replace(ROW, schema=99))
    with pytest.raises(ValueError, match="rows of schema 99, this version reads 1"):
        read_rows(path)
