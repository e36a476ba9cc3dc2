from __future__ import annotations

from rich.console import Console

from mmtok_bench.results import ResultRow
from mmtok_bench.serve.table import TABLE_WIDTH, serve_tables
from tests.bench.serve.made_up_rows import row


def lines_of(*rows: ResultRow) -> list[str]:
    console = Console(record=True, width=TABLE_WIDTH)
    for table in serve_tables(rows):
        console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def cells_of(lines: list[str], server: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f" {server} ")]
    return line.removeprefix(f" {server}").split()


def test_ratios_are_over_off_and_over_the_smaller_image() -> None:
    rows = [row("mmtok", "10%", 100), row("none", "all", 310), row("downsample", "10%", 50), row("none", "off", 300)]
    lines = lines_of(*rows)
    # Image tokens; p50 and p90; x off; x smaller; ITL; requests a second, x off; stages; fit at once.
    assert cells_of(lines, "off") == ["1008", "300", "300", "20.0", "3.33", "15"]
    assert cells_of(lines, "all") == ["1008", "310", "310", "0.97", "20.0", "3.23", "0.97", "5", "15"]
    assert cells_of(lines, "10%") == ["100", "100", "100", "3.00", "0.50", "20.0", "10.00", "3.00", "5", "115"]
    assert cells_of(lines, "smaller, as 10%") == ["100", "50", "50", "6.00", "20.0", "20.00", "6.00", "115"]
    assert lines[0].endswith("photograph 1008x784, 1 at once, 3 tokens out")
    assert not any("…" in line for line in lines)


def test_servers_are_in_one_order_however_they_were_measured() -> None:
    rows = [row("downsample", "10%", 50), row("mmtok", "10%", 100), row("none", "all", 310), row("none", "off", 300)]
    shown = [line.split()[0] for line in lines_of(*rows) if line]
    assert shown[-4:] == ["off", "all", "10%", "smaller,"]


def test_a_row_without_its_counterpart_has_no_ratio() -> None:
    assert cells_of(lines_of(row("mmtok", "10%", 100)), "10%") == ["100", "100", "100", "20.0", "10.00", "5", "115"]


def test_workloads_have_tables_of_their_own() -> None:
    lines = lines_of(row("none", "off", 300), row("none", "off", 500, concurrency=4))
    assert [line.rpartition(": ")[2] for line in lines if "at once," in line] == [
        "photograph 1008x784, 1 at once, 3 tokens out",
        "photograph 1008x784, 4 at once, 3 tokens out",
    ]
    assert serve_tables([]) == []
