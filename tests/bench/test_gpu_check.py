from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from mmtok_bench import gpu_check
from mmtok_bench.gpu_check import PARTS, Part, _run, judge, main
from mmtok_bench.results import ResultRow, read_rows

MEASURED = Path(__file__).parents[2] / "docs" / "measured"


def part_of(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)


def test_rows_of_an_h200_are_held_against_the_bars() -> None:
    rows = read_rows(MEASURED / "serve-h200.jsonl")
    found = {text: (value, reached) for text, _, value, reached in judge(part_of("qwen-7b-16"), rows, [0])}
    assert found["requests/s at 16"] == ("0.596 x", False)
    assert found["`all`, requests/s at 16"] == ("0.902 x", False)
    lines = judge(part_of("qwen-7b-1"), read_rows(MEASURED / "serve-h200-prefill-graph.jsonl"), [0])
    found = {text: (value, reached) for text, _, value, reached in lines}
    assert found["TTFT at 1"] == ("1.21 x", False)
    assert found["requests/s at 1"] == ("1.25 x", True)
    assert found["`all`, requests/s at 1"] == ("not measured", None)
    assert found["the selection's share of TTFT"] == ("1.79 %", True)


def test_the_newest_row_of_the_largest_image_counts() -> None:
    rows = list(read_rows(MEASURED / "serve-h200.jsonl"))

    def changed(row: ResultRow, time: str, tokens: int) -> ResultRow:
        metrics = {**row.metrics, "requests_per_s": 1000.0, "image_tokens_in": tokens}
        return replace(row, metrics=metrics, time=time)

    pruned = next(row for row in rows if row.case["budget"] == "10%" and row.case["method"] == "mmtok")
    older, smaller = changed(pruned, "2020", 864), changed(pruned, "2030", 64)
    part = part_of(f"qwen-7b-{pruned.case['concurrency']}")
    assert judge(part, [*rows, older, smaller], [0]) == judge(part, rows, [0])
    assert judge(part, [*rows, changed(pruned, "2030", 864)], [0]) != judge(part, rows, [0])


def test_a_failed_command_falls_short() -> None:
    (line,) = judge(part_of("kernels"), [], [1])
    assert line == ("its command", "exit code 0", "exit code 1", False)
    assert judge(part_of("kernels"), [], [0])[0][-1] is True
    assert judge(part_of("selector"), [], [124])[0][-1] is False


def test_a_part_that_is_run_leaves_what_the_table_is_made_of(tmp_path: Path) -> None:
    def fail() -> list[ResultRow]:
        raise RuntimeError("no kernel")

    program = "import sys; open(sys.argv[1] + '/x.jsonl', 'w'); sys.exit(3)"
    _run(Part("it", "about it", (("-c", program, "FOLDER"), ("-c", "print('said')")), in_process=fail), tmp_path)
    assert json.loads((tmp_path / "done.json").read_text())["exit_codes"] == [3, 0, 1]
    assert (tmp_path / "command-1.log").read_text().endswith("said\n")
    assert "RuntimeError: no kernel" in (tmp_path / "in-process.log").read_text()


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_TIMEOUT_S", 3)
    # A duration that no other process sleeps for.
    duration = f"600.{os.getpid()}"
    program = f"import subprocess; subprocess.run(['sleep', '{duration}'])"
    _run(Part("it", "about it", (("-c", program),)), tmp_path)
    assert json.loads((tmp_path / "done.json").read_text())["exit_codes"] == [124]
    assert not any(duration in (each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "kernels,kernel"]) == 2
    assert "got 'kernel'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmtok_bench.gpu_check", "--output", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr.startswith("gpu-check needs an NVIDIA GPU")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        command[3:]
        for part in PARTS
        for command in part.commands
        if command[:4] == ("-m", "mmtok_deploy", "bench", "serve")
    ],
    ids=lambda arguments: arguments[2],
)
def test_what_it_serves_can_be_planned(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    from mmtok_deploy.cli import main as mmtok

    assert mmtok(["bench", *arguments, "--dry-run"]) == 0, capsys.readouterr().err
