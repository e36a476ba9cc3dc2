"""`mmtok soak` without a server: what it is told, what it writes, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmtok_bench.results import read_rows
from mmtok_bench.server import ServerError
from mmtok_deploy.cli import main
from mmtok_soak import faults
from mmtok_soak.faults import ROWS, Row
from mmtok_soak.trial import Trial

SERVED = {"fuzz", "images", "events", "weights", "leak", "storm", "memory", "values", "hooks", "agent", "kill"}


def stand_in(name: str, run: Callable[[Trial], None]) -> Row:
    return Row(name, "a fault", "by hand", "nothing is lost", 1, run)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    """Rows in place of the real ones."""

    def holds(trial: Trial) -> None:
        trial.count("requests", trial.scaled(300, at_least=10))

    def fails(trial: Trial) -> None:
        for number in range(3):
            trial.fail("an answer is wrong", f"seed {trial.seed} number {number}")

    def breaks(trial: Trial) -> None:
        raise ServerError("it died")

    def interrupted(trial: Trial) -> None:
        raise KeyboardInterrupt

    def idles(trial: Trial) -> None:
        trial.count("fixed_chats", 20)

    made = {"holds": holds, "fails": fails, "breaks": breaks, "interrupted": interrupted, "idles": idles}
    stand_ins = {name: stand_in(name, run) for name, run in made.items()}
    monkeypatch.setattr(faults, "ROWS", stand_ins)
    monkeypatch.setattr("mmtok_soak.table.ROWS", stand_ins)
    return stand_ins


def soak(folder: Path, *arguments: str) -> int:
    return main(["soak", "--families", "qwen2.5-vl", "--results-dir", str(folder), *arguments])


def written(folder: Path) -> list[Any]:
    (path,) = folder.glob("soak-*.jsonl")
    return read_rows(path)


def test_every_row_has_a_name_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(ROWS) >= SERVED | {"artifacts", "drift", "keys"}
    assert main(["soak", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ROWS)


def test_a_row_that_holds(rows: dict[str, Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak(tmp_path, "--rows", "holds", "--minutes", "3", "--json") == 0
    (row,) = written(tmp_path)
    assert row.case == {"row": "holds", "family": "qwen2.5-vl", "seed": 0, "minutes": 3.0, "lost": ""}
    assert (row.metrics["num_requests"], row.metrics["num_failures"]) == (30, 0)
    assert json.loads(capsys.readouterr().out)["case"]["row"] == "holds"


def test_a_failure_is_1_and_the_other_rows_are_run(rows: dict[str, Row], tmp_path: Path) -> None:
    assert soak(tmp_path, "--rows", "fails,breaks,holds", "--seed", "7") == 1
    failed, broken, held = written(tmp_path)
    assert failed.case["lost"] == "an answer is wrong (3)"
    assert failed.metrics["num_failures"] == 3
    assert "does not start or answer" in broken.case["lost"]
    assert held.case["lost"] == ""
    (said,) = tmp_path.glob("soak-*/failures.txt")
    assert "seed 7 number 2" in said.read_text()


def test_a_row_that_ran_nothing_does_not_hold(rows: dict[str, Row], tmp_path: Path) -> None:
    assert soak(tmp_path, "--rows", "idles") == 1
    assert written(tmp_path)[0].case["lost"] == "nothing was run (1)"


def test_ctrl_c_is_130_and_keeps_the_rows_before(rows: dict[str, Row], tmp_path: Path) -> None:
    assert soak(tmp_path, "--rows", "holds,interrupted,fails") == 130
    assert [row.case["row"] for row in written(tmp_path)] == ["holds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "fuzz,fuss"], "got fuss"),
        (["--write-table", "none.jsonl"], "none.jsonl"),
    ],
)
def test_wrong_names_are_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--families", "a"], ["--rows", ","]])
def test_wrong_values_are_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["soak", *arguments])
    assert stop.value.code == 2


def test_the_table_is_written_between_its_marks(rows: dict[str, Row], tmp_path: Path) -> None:
    soak(tmp_path, "--rows", "holds,fails")
    (path,) = tmp_path.glob("soak-*.jsonl")
    page = tmp_path / "page.md"
    marks = ("<!-- the fault table begins -->", "<!-- the fault table ends -->")
    page.write_text(f"before\n{marks[0]}\nof before\n{marks[1]}\nafter\n")
    for _ in range(2):
        assert main(["soak", "--write-table", str(path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{marks[0]}\n\n| row |")
    assert text.endswith(f"\n\n{marks[1]}\nafter\n")
    assert "of before" not in text
    holds, fails, *others = (line for line in text.splitlines() if line.startswith("| `"))
    assert len(others) == len(rows) - 2
    assert all(line.endswith("| not run |  |") for line in others)
    assert "qwen2.5-vl: 50 requests | qwen2.5-vl: nothing |" in holds
    assert fails.endswith("qwen2.5-vl: an answer is wrong (3) |")


def test_a_page_without_marks_is_2(rows: dict[str, Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soak(tmp_path, "--rows", "holds")
    (path,) = tmp_path.glob("soak-*.jsonl")
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    assert main(["soak", "--write-table", str(path), "--page", str(page)]) == 2
    assert "the fault table begins" in capsys.readouterr().err
