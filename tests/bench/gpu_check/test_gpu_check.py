from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from mmtok_bench.results import ResultRow, append_row, make_row, read_rows
from mmtok_gpu_check import __main__ as gpu_check
from mmtok_gpu_check import runs
from mmtok_gpu_check.__main__ import main
from mmtok_gpu_check.parts import PARTS, Part
from mmtok_gpu_check.runs import judge, rows_in, run_part

MEASURED = Path(__file__).parents[2] / "data" / "gpu"


def part_of(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)


def test_rows_of_an_h200_are_held_against_the_bars() -> None:
    rows = read_rows(MEASURED / "serve-h200-default.jsonl")
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
    rows = list(read_rows(MEASURED / "serve-h200-default.jsonl"))

    def changed(row: ResultRow, time: str, tokens: int) -> ResultRow:
        metrics = {**row.metrics, "requests_per_s": 1000.0, "image_tokens_in": tokens}
        return replace(row, metrics=metrics, time=time)

    pruned = next(row for row in rows if row.case["budget"] == "10%" and row.case["method"] == "mmtok")
    older, smaller = changed(pruned, "2020", 864), changed(pruned, "2030", 64)
    part = part_of(f"qwen-7b-{pruned.case['concurrency']}")
    assert judge(part, [*rows, older, smaller], [0]) == judge(part, rows, [0])
    assert judge(part, [*rows, changed(pruned, "2030", 864)], [0]) != judge(part, rows, [0])


def test_a_load_of_another_kind_is_not_taken_for_the_parts(tmp_path: Path) -> None:
    rows = read_rows(MEASURED / "serve-h200-default.jsonl")
    with_setting = [replace(row, case={**row.case, "server_arguments": "--it"}) for row in rows]
    with_questions = [
        replace(row, case={**row.case, "questions_per_image": 6, "prefix_cache": "on", "concurrency": 16})
        for row in rows
        if row.case["concurrency"] == 16
    ]
    part = part_of("qwen-7b-16")
    assert judge(part, [*rows, *with_setting, *with_questions], [0]) == judge(part, rows, [0])
    (line,) = judge(part_of("qwen-7b-questions"), [*rows, *with_questions], [0])
    assert line == ("requests/s at 16", "at least 1 x", "0.596 x", False)
    # Rows of several rounds bring the median of the rounds' ratios.
    of_rounds = [replace(row, metrics={**row.metrics, "requests_per_s_gain": 1.25}) for row in with_questions]
    assert judge(part_of("qwen-7b-questions"), of_rounds, [0])[0][2:] == ("1.25 x", True)


def test_a_setting_is_held_against_the_rows_of_another_part(tmp_path: Path) -> None:
    part = part_of("setting-one-tokenizer")
    for name, arguments, rate in (
        ("qwen-7b-16", "", 10.0),
        ("setting-one-tokenizer", "--tokenizer-worker-num=1", 12.0),
    ):
        (tmp_path / name).mkdir()
        for row in read_rows(MEASURED / "serve-h200-default.jsonl"):
            case = {**row.case, "server_arguments": arguments}
            append_row(
                tmp_path / name / "it.jsonl", replace(row, case=case, metrics={**row.metrics, "requests_per_s": rate})
            )
    lines = judge(part, rows_in(part, tmp_path), [0])
    assert [(text.partition("`")[2][:3], value, reached) for text, _, value, reached in lines] == [
        *(("off", "1.2 x", True), ("all", "1.2 x", True), ("10%", "1.2 x", True)),
    ]
    (tmp_path / "qwen-7b-16" / "it.jsonl").unlink()
    assert judge(part, rows_in(part, tmp_path), [0])[0][2:] == ("not measured", None)


def test_what_is_measured_by_commands_of_its_own() -> None:
    def row(bench: str, case: dict[str, str], metrics: dict[str, float]) -> ResultRow:
        return make_row(bench, case, "sglang", metrics, num_runs=1, device=torch.device("cpu"))

    metrics = {"first_ttft_ms": 90.0, "later_ttft_p90_ms": 100.0, "num_failed": 0.0}
    lines = judge(part_of("first-request"), [row("served-checks", {}, metrics)], [0])
    # A server that counts no compilation has not shown that there is none.
    assert [line[2:] for line in lines] == [("0.9 x", True), ("not measured", None), ("0", True)]
    lines = judge(part_of("first-request"), [row("served-checks", {}, {**metrics, "triton_compiles": 3.0})], [0])
    assert lines[1][2:] == ("3", False)
    errors = {"max_error": 1e-4, "question_error": 2e-2}
    case = {"family": "llava-1.5", "prefill": "eager", "encoder": "eager"}
    lines = judge(part_of("logprobs"), [row("device-logprobs", case, errors)], [0, 0, 0])
    found = {text: rest for text, _, *rest in lines}
    assert found["llava-1.5, logprobs against the hand-pruned model"] == ["0.0001", True]
    assert found["llava-1.5, another question's against that"] == ["200 x", True]
    assert found["llava-next, another question's against that"] == ["not measured", None]
    case = {"family": "qwen2.5-vl", "prefill": "graphs", "encoder": "eager"}
    in_half = {"max_error": 3e-3, "question_error": 0.3, "position_error": 2e-2, "half_error": 2e-3}
    replayed = {**in_half, "num_replayed": 2}
    lines = judge(part_of("logprobs-graphs"), [row("device-logprobs", case, replayed)], [0, 0, 0])
    found = {text: rest for text, _, *rest in lines}
    assert found["qwen2.5-vl, prefill graphs, wrong positions' against that"] == ["6.67 x", True]
    assert found["qwen2.5-vl, prefill graphs, another question's against that"] == ["100 x", True]
    half = "qwen2.5-vl, prefill graphs, difference of logprobs, against that of the hand-pruned model in float16"
    assert found[half] == ["1.5 x", True]
    assert not any("qwen3.5" in text and "positions" in text for text in found)
    lines = judge(
        part_of("video"),
        [row("device-logprobs", {"family": "qwen3-vl", "prefill": "eager", "encoder": "eager"}, in_half)],
        [0, 0],
    )
    found = {text: rest for text, _, *rest in lines}
    assert found["qwen3-vl, wrong positions' against that"] == ["6.67 x", True]
    assert found["qwen2.5-vl, wrong positions' against that"] == ["not measured", None]
    assert all("--videos" in command for command in part_of("video").commands)
    drafted = {"family": "qwen3-vl", "prefill": "eager", "encoder": "eager", "drafts": "eagle3"}
    lines = judge(part_of("drafts"), [row("device-logprobs", drafted, {**in_half, "num_correct_drafts": 9})], [0] * 5)
    found = {text: rest for text, _, *rest in lines}
    assert found["qwen3-vl, drafts by eagle3, right drafts"] == ["9", True]
    assert found["qwen2.5-vl, drafts by eagle3, right drafts"] == ["not measured", None]
    lines = judge(part_of("logprobs-graphs"), [row("device-logprobs", case, replayed)], [0, 0, 0])
    found = {text: rest for text, _, *rest in lines}
    # Two replays are not those of the images.
    assert found["qwen2.5-vl, prefill graphs, prefills replayed"] == ["2", False]
    assert found["qwen3-vl, prefill graphs, prefills replayed"] == ["not measured", None]


@pytest.mark.parametrize(("memory_gib", "preset", "rounds"), [(139.8, "h200", "5"), (79.2, "h100", "1")])
def test_a_smaller_gpu_has_one_server_at_a_time(memory_gib: float, preset: str, rounds: str) -> None:
    (command,) = part_of("qwen-7b-16").commands
    words = runs._filled_in(command, Path("there"), memory_gib)
    assert words[words.index("--preset") + 1] == preset
    assert words[words.index("--rounds") + 1] == rounds
    assert words[words.index("--results-dir") + 1] == "there"


def test_arguments_of_all_servers_go_beside_a_parts_own(tmp_path: Path) -> None:
    of_all = "--attention-backend triton"
    for name, own in (("qwen-7b-16", ""), ("setting-one-tokenizer", " --tokenizer-worker-num=1")):
        (command,) = part_of(name).commands
        words = runs._filled_in(command, tmp_path, 139.8, of_all)
        assert [word for word in words if word.startswith("--server-args")] == [f"--server-args={of_all}{own}"]
        (tmp_path / name).mkdir()
        for row in read_rows(MEASURED / "serve-h200-default.jsonl"):
            append_row(tmp_path / name / "it.jsonl", replace(row, case={**row.case, "server_arguments": of_all + own}))
    rows = rows_in(part_of("setting-one-tokenizer"), tmp_path, of_all)
    assert {row.case["server_arguments"] for row in rows} == {"", "--tokenizer-worker-num=1"}
    assert all(reached is not None for *_, reached in judge(part_of("setting-one-tokenizer"), rows, [0]))
    (tests,) = part_of("kernels").commands
    assert runs._filled_in(tests, tmp_path, 139.8, of_all) == list(tests)


def test_a_part_that_a_gpu_has_no_memory_for_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(gpu_check, "memory_gib", lambda: 79.2)
    assert main(["--parts", "qwen-32b", "--output", str(tmp_path)]) == 0
    assert "qwen-32b is not run: it needs 120 GiB of GPU memory" in capsys.readouterr().out
    assert "not run" in (tmp_path / "table.txt").read_text()


def test_a_dry_run_prints_every_command_and_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for part in PARTS:
        assert f"# {part.name}: " in said
        assert all(bar.text in said for bar in part.bars)
    assert not any(word in said.split() for word in ("FOLDER", "PRESET", "ROUNDS"))
    assert not (tmp_path / "out").exists()


def test_a_failed_command_falls_short() -> None:
    (line,) = judge(part_of("kernels"), [], [1])
    assert line == ("its command", "exit code 0", "exit code 1", False)
    assert judge(part_of("kernels"), [], [0])[0][-1] is True
    assert judge(part_of("selector"), [], [124])[0][-1] is False


def test_a_part_that_is_run_leaves_what_the_table_is_made_of(tmp_path: Path) -> None:
    def fail() -> list[ResultRow]:
        raise RuntimeError("no kernel")

    program = "import sys; open(sys.argv[1] + '/x.jsonl', 'w'); sys.exit(3)"
    run_part(Part("it", "about it", (("-c", program, "FOLDER"), ("-c", "print('said')")), in_process=fail), tmp_path)
    assert json.loads((tmp_path / "done.json").read_text())["exit_codes"] == [3, 0, 1]
    assert (tmp_path / "command-1.log").read_text().endswith("said\n")
    assert "RuntimeError: no kernel" in (tmp_path / "in-process.log").read_text()


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_TIMEOUT_S", 3)
    # A duration that no other process sleeps for.
    duration = f"600.{os.getpid()}"
    program = f"import subprocess; subprocess.run(['sleep', '{duration}'])"
    run_part(Part("it", "about it", (("-c", program),)), tmp_path)
    assert json.loads((tmp_path / "done.json").read_text())["exit_codes"] == [124]
    assert not any(duration in (each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "kernels,kernel"]) == 2
    assert "got 'kernel'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("gpu-check: needs an NVIDIA GPU")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [command for part in PARTS for command in part.commands if command[:4] == ("-m", "mmtok_deploy", "bench", "serve")],
    ids=lambda command: f"{command[command.index('--models') + 1]}-{command[-1]}",
)
def test_what_it_serves_can_be_planned(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmtok_deploy.cli import main as mmtok

    arguments = runs._filled_in(command, tmp_path, 139.8)[2:]
    assert mmtok([*arguments, "--dry-run"]) == 0, capsys.readouterr().err
