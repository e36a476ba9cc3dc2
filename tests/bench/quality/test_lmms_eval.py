"""lmms-eval's command line and results; the program itself runs in test_served.py, where it is installed."""

from __future__ import annotations

import itertools
import json
import stat
from pathlib import Path

import pytest

from mmtok_bench.quality.lmms_eval import LmmsEvalError, command_line, program_of, run_lmms_eval
from mmtok_bench.quality.published import BENCHMARKS, PAPER_BUDGETS, PUBLISHED
from mmtok_bench.report.frame import frame_of
from mmtok_bench.report.quality import quality_part
from mmtok_bench.report.tables import Table
from mmtok_bench.results import CaseValue, ResultRow, read_rows
from mmtok_deploy.cli import main
from tests.bench.report.rows import row

# As lmms-eval 0.7.3 writes them.
RESULTS = {
    "results": {
        "pope": {
            "alias": "pope",
            "pope_f1_score,none": 0.5,
            "pope_accuracy,none": 0.75,
            "pope_f1_score_stderr,none": "N/A",
            "pope_accuracy_stderr_clt,none": 0.1,
        }
    },
    "n-samples": {"pope": {"original": 9000, "effective": 40}},
}
ANSWERED = '{"doc_id": 0, "target": "yes", "filtered_resps": "yes"}\n'
FAILED = '{"doc_id": 1, "target": "no", "filtered_resps": "[LMMS_EVAL_REQUEST_FAILED after 1 retries] 500"}\n'
NO_HUB = "tenacity.RetryError: RetryError[<Future state=finished raised ConnectionError>]\n"


def make_program(venv: Path, samples: str | None, output: str = "") -> Path:
    """Makes an `lmms-eval` that prints `output` and writes RESULTS and `samples`, and ends with 0 whatever happens."""
    program = venv / "bin" / "lmms-eval"
    program.parent.mkdir(parents=True)
    writes = (
        ""
        if samples is None
        else (
            f"(folder / '0_results.json').write_text({json.dumps(RESULTS)!r})\n"
            f"(folder / '0_samples_pope.jsonl').write_text({samples!r})\n"
        )
    )
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_path') + 1]) / 'default'\n"
        f"folder.mkdir(parents=True)\nprint({output!r})\n{writes}"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return program


def run_program(tmp_path: Path, samples: str | None, output: str = "", tasks: tuple[str, ...] = ("pope",)) -> float:
    program = make_program(tmp_path / "venv", samples, output)
    command = command_line(program, tasks, "http://127.0.0.1:9", tmp_path / "out", num_at_once=4)
    score = run_lmms_eval(command, tasks, tmp_path / "out")["pope"]
    assert score.num_questions == 40
    assert score.metrics == {"pope_f1_score": 0.5, "pope_accuracy": 0.75}
    return score.metrics["pope_f1_score"]


def test_command_line(tmp_path: Path) -> None:
    command = command_line(
        Path("lmms-eval"), ["pope", "gqa"], "http://host:1/", tmp_path, num_at_once=8, limit=5, include_path=tmp_path
    )
    given = dict(itertools.pairwise(command))
    assert given["--tasks"] == "pope,gqa"
    assert given["--limit"] == "5"
    model = dict(pair.split("=", 1) for pair in given["--model_args"].split(","))
    assert (model["base_url"], model["num_concurrent"], model["max_retries"]) == ("http://host:1/v1", "8", "1")


def test_scores(tmp_path: Path) -> None:
    assert run_program(tmp_path, ANSWERED) == 0.5


def test_failed_requests_are_no_wrong_answers(tmp_path: Path) -> None:
    with pytest.raises(LmmsEvalError, match="1 requests failed"):
        run_program(tmp_path, ANSWERED + FAILED)


def test_missing_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LmmsEvalError, match=r"data of pope are missing.*HF_HOME.*--include-path"):
        run_program(tmp_path, None, NO_HUB)


def test_another_end_shows_the_log(tmp_path: Path) -> None:
    with pytest.raises(LmmsEvalError, match=r"no results for pope (.|\n)*out of cheese"):
        run_program(tmp_path, None, "out of cheese")


def test_a_task_without_results(tmp_path: Path) -> None:
    with pytest.raises(LmmsEvalError, match="no gqa, but pope"):
        run_program(tmp_path, ANSWERED, tasks=("pope", "gqa"))


def test_not_installed(tmp_path: Path) -> None:
    with pytest.raises(LmmsEvalError, match="mmtok quality setup"):
        program_of(tmp_path)


def test_rows_of_a_running_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_program(tmp_path / "venv", ANSWERED)
    command = ["quality", "--tasks=pope", "--url=http://127.0.0.1:9", "--budgets=4", "--family=llava-1.5"]
    assert main([*command, f"--lmms-venv={tmp_path / 'venv'}", f"--results-dir={tmp_path / 'results'}"]) == 0
    (path,) = (tmp_path / "results").glob("*.jsonl")
    (row,) = read_rows(path)
    assert row.metrics["score"] == 0.5
    assert (row.case["task"], row.case["method"], row.case["budget"]) == ("pope", "mmtok", "4")
    printed = capsys.readouterr().out
    assert printed.count("the paper") == 1
    assert "LLaVA-1.5" in next(line for line in printed.splitlines() if "87.7" in line)


def test_dry_run_starts_a_server_for_each_budget(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quality", "--tasks=gqa,mme", "--family=llava-1.5", "--model-path=llava-hf/llava-1.5-7b-hf", "--dry-run"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    servers = [line.partition("--mmtok-budget=")[2] for line in lines[::2]]
    settings = ["all", *(f"{budget} --mmtok-method=mmtok" for budget in ("192", "128", "64"))]
    assert servers == [f"{setting} --model-impl=transformers" for setting in settings]
    assert all("--tasks gqa,mme " in line for line in lines[1::2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=vqa2", "--budgets=64", "--model-path=m"], "got vqa2"),
        (["--tasks=pope", "--model-path=m"], "--family"),
        (["--tasks=pope", "--budgets=64"], "--model-path"),
        (["--tasks=pope", "--budgets=64,32", "--url=http://127.0.0.1:9"], "one --budgets"),
        (["--tasks=pope,count", "--budgets=64", "--model-path=m"], "one by one"),
        (["--tasks=pope,pages", "--budgets=64", "--model-path=m"], "got pope, pages; run them one by one"),
        (["--tasks=pope", "--budgets=64", "--methods=fastv", "--model-path=m"], "method is one of"),
        (["--tasks=count", "--resume=nowhere.jsonl", "--url=http://127.0.0.1:9"], "nowhere.jsonl is none"),
        (["--tasks=count", "--budgets=0", "--url=http://127.0.0.1:9"], "budget"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def public_table(rows: list[ResultRow]) -> Table:
    (table,) = quality_part(frame_of(rows)).tables
    return table


def test_the_papers_rows_of_the_same_budget_stand_below_ours() -> None:
    case: dict[str, CaseValue] = {"task": "mme", "model": "", "preset": "llava-1.5", "method": "mmtok", "budget": "64"}
    ours, *theirs = public_table([row("quality", case, {"score": 1100.0, "num_questions": 10})]).rows
    assert ours[0] == "mme"
    assert theirs == [
        ("mme", "LLaVA-1.5-7B, the paper", "mmtok", "64", "1715", "92.1", ""),
        ("mme", "LLaVA-1.5-13B, the paper", "mmtok", "64", "1763", "97.0", ""),
    ]


@pytest.mark.parametrize(
    ("task", "score", "shown"),
    # As lmms-eval 0.7.3 gives them: OCRBench of a thousand points is a fraction too.
    [("pope", 0.8541, "85.41"), ("ocrbench", 0.596, "59.6"), ("mmbench", 61.17, "61.17"), ("my_task", 0.5, "0.5")],
)
def test_our_scores_have_the_papers_unit(task: str, score: float, shown: str) -> None:
    case: dict[str, CaseValue] = {"task": task, "model": "", "preset": "", "method": "mmtok", "budget": "64"}
    (line,) = public_table([row("quality", case, {"score": score, "num_questions": 10})]).rows
    assert line[:5] == (task, "measured", "mmtok", "64", shown)


def test_every_budget_of_the_paper_has_its_rows() -> None:
    quoted = {(each.family, each.budget) for each in PUBLISHED if each.benchmark == "gqa"}
    assert {(family, budget) for family, budgets in PAPER_BUDGETS.items() for budget in budgets} <= quoted


def test_what_is_quoted_has_a_benchmark_and_a_budget() -> None:
    assert {quoted.benchmark for quoted in PUBLISHED} <= set(BENCHMARKS)
    assert {quoted.family for quoted in PUBLISHED} <= set(PAPER_BUDGETS)
