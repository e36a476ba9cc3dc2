from __future__ import annotations

from rich.console import Console

from mmtok_deploy.bench.serve.table import serve_tables
from tests.bench.serve.made_up_rows import row


def lines_of(*rows: object) -> list[list[str]]:
    console = Console(record=True, width=240)
    for table in serve_tables(rows):  # type: ignore[arg-type]
        console.print(table)
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_ratios_are_over_off_and_over_the_smaller_image() -> None:
    rows = [row("none", "off", 300), row("none", "all", 310), row("mmtok", "10%", 100), row("downsample", "10%", 50)]
    off, at_all, pruned, smaller = lines_of(*rows)
    assert off[:6] == ["1008x784 photograph", "1", "off", "1008 -> 1008", "300 (300)", ""]
    assert at_all[2:6] == ["all", "1008 -> 1008", "310 (310)", "0.97"]
    assert pruned[2:7] == ["10%", "1008 -> 100", "100 (100)", "3.00", "0.50"]
    assert smaller[2:7] == ["smaller image (10%)", "1008 -> 100", "50 (50)", "6.00", ""]
    assert [line[9] for line in (off, at_all, pruned, smaller)] == ["", "0.97", "3.00", "6.00"]
    assert [line[10] for line in (off, pruned)] == ["- - -", "- 5 -"]


def test_a_row_without_its_counterpart_has_no_ratio() -> None:
    (pruned,) = lines_of(row("mmtok", "10%", 100))
    assert pruned[5:7] == ["", ""]


def test_workloads_are_apart_and_models_have_tables_of_their_own() -> None:
    assert [line[1] for line in lines_of(row("none", "off", 300), row("none", "off", 500, concurrency=4))] == ["1", "4"]
    assert serve_tables([]) == []
