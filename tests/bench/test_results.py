from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtok_bench.results import (
    SCHEMA,
    UnfinishedRowWarning,
    append_row,
    drop_unfinished_line,
    make_latency_row,
    make_row,
    new_result_file,
    read_rows,
)

CPU = torch.device("cpu")
ROW = make_latency_row("selector", {"num_tokens": 9, "batch": 1}, "lazy", [5.0, 1.0, 2.0, 3.0, 4.0, 6.0], CPU)
WRITTEN: dict[str, Any] = asdict(ROW)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_a_row_has_the_quantiles_and_says_where_it_comes_from() -> None:
    assert ROW.metrics == {"latency_p20_ms": 2.0, "latency_p50_ms": 3.5, "latency_p80_ms": 5.0}
    assert ROW.num_runs == 6
    assert ROW.schema == SCHEMA
    assert ROW.versions["torch"] == torch.__version__
    assert ROW.versions["sglang"] == version("sglang")
    assert ROW.device
    assert ROW.num_threads == torch.get_num_threads()
    assert ROW.time.endswith("+00:00")


def test_a_row_of_metrics() -> None:
    row = make_row("serve", {"budget": "10%"}, "sglang", {"ttft_p50_ms": 8}, num_runs=3, device=CPU, num_threads=7)
    assert (row.metrics, row.num_runs, row.num_threads) == ({"ttft_p50_ms": 8}, 3, 7)


@pytest.mark.parametrize("value", [math.nan, math.inf, "8", None, True])
def test_what_was_not_measured_is_absent(value: Any) -> None:
    with pytest.raises(ValueError, match="metric ttft_p50_ms is a finite number, or absent"):
        make_row("serve", {}, "sglang", {"ttft_p50_ms": value}, num_runs=1, device=CPU)


@pytest.mark.parametrize("value", [None, False, [1]])
def test_a_case_is_numbers_and_texts(value: Any) -> None:
    with pytest.raises(ValueError, match="a case's budget is a number or a text"):
        make_row("serve", {"budget": value}, "sglang", {}, num_runs=1, device=CPU)


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


def test_fields_that_a_later_version_added_are_skipped(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", {**WRITTEN, "host": "a"})) == [ROW]


@pytest.mark.parametrize("schema", [99, 0, 1, "2", None, True, 1.5])
def test_another_schema_is_refused(schema: object, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", WRITTEN, {**WRITTEN, "schema": schema})
    with pytest.raises(ValueError, match=rf"rows.jsonl:2 .*its schema is {schema!r}, .* reads 2"):
        read_rows(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{\n", "is no JSON, expected a result row: '{'"),
        ("\n", "is no JSON"),
        ("[1]\n", "expected a JSON object with a schema"),
        ({"bench": "selector"}, "expected a JSON object with a schema"),
        ({"schema": 2, "case": {}}, "it has no bench, backend, metrics, "),
        ({**WRITTEN, "metrics": [1.0]}, r"its metrics is \[1.0\], expected dict"),
        ({**WRITTEN, "metrics": {"ttft_p50_ms": None}}, "metric ttft_p50_ms is a finite number"),
        ({**WRITTEN, "time": 3}, "its time is 3, expected str"),
    ],
)
def test_lines_that_are_no_rows_are_told_by_number(line: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", WRITTEN, line, WRITTEN)
    with pytest.raises(ValueError, match=f"rows.jsonl:2 .*{message}"):
        read_rows(path)


def test_a_last_row_cut_off_is_skipped_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", WRITTEN, json.dumps(WRITTEN)[:100])
    with pytest.warns(UnfinishedRowWarning, match="rows.jsonl:2 was cut off and is skipped"):
        assert read_rows(path) == [ROW]


def test_a_last_row_that_lacks_only_its_end_of_line_is_whole(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", WRITTEN, json.dumps(WRITTEN))) == [ROW, ROW]


def test_a_last_line_without_its_end_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", WRITTEN, json.dumps(WRITTEN)[:100])
    assert drop_unfinished_line(path)
    append_row(path, ROW)
    assert read_rows(path) == [ROW, ROW]
    assert not drop_unfinished_line(path)
    assert read_rows(path) == [ROW, ROW]
