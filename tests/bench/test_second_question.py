from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mmtok_bench import second_question
from mmtok_bench.results import latencies_ms, read_rows


def test_rows_and_their_table(tmp_path: Path) -> None:
    times_ms = {(256, 1): [100.0, 120.0], (256, 2): [10.0, 12.0], (0, 1): [101.0, 121.0], (0, 2): [99.0, 119.0]}
    rows = second_question._write(times_ms, tmp_path)
    (path,) = tmp_path.iterdir()
    assert read_rows(path) == rows
    assert [(row.case["feature_cache_mb"], row.case["question"], latencies_ms(row)[1]) for row in rows] == [
        (256, 1, 110.0),
        (256, 2, 11.0),
        (0, 1, 111.0),
        (0, 2, 109.0),
    ]
    console = Console(record=True, width=100)
    console.print(second_question._table(rows))
    lines = [line.replace(" ", "") for line in console.export_text().splitlines()]
    assert "│256│110ms│11ms│" in lines
    assert "│0│111ms│109ms│" in lines
