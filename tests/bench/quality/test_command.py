"""`mmtok quality` against a server that knows no model."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtok_bench.pocket import pocket_checkpoint
from mmtok_bench.quality import bench, lmms_eval, public
from mmtok_bench.results import read_rows
from mmtok_deploy.cli import main
from tests.bench.quality.stand_in import budget_of, completion, says, serving

PRUNES = {"mmtok_budget": "all", "model_path": "made up"}


def arguments(url: str, folder: Path, *more: str) -> list[str]:
    few = ["--tasks=existence,count", "--methods=even", "--budgets=all,4", "--seeds=0,1", "--num-questions=8"]
    return ["quality", f"--url={url}", *few, f"--results-dir={folder}", *more]


def test_table_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(says("yes"), PRUNES) as url:
        assert main(arguments(url, tmp_path)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "made up: existence: accuracy, % (95% interval), 16 questions; chance 50" in shown
    assert "made up: existence, POPE's F1, %" in shown
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".answers"}
    report = tmp_path / "report.md"
    assert main(["bench", "report", str(tmp_path), "--markdown", str(report)]) == 0
    assert "## Quality" in report.read_text() or "# Quality" in report.read_text()


def test_a_server_without_the_plugin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(says("yes"), {"mmtok_budget": None}) as url:
        assert main(arguments(url, tmp_path)) == 1
    assert "--mmtok-budget all" in capsys.readouterr().err


def test_a_failed_request_keeps_what_was_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return (200, completion("no", 196)) if budget_of(body) == "all" else (503, {"error": {"message": "full"}})

    with serving(reply, PRUNES) as url:
        assert main(arguments(url, tmp_path)) == 1
    assert "--resume" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.jsonl")
    assert len(read_rows(path)) == 3 * 2
    with serving(says("yes"), PRUNES) as url:
        assert main(arguments(url, tmp_path, f"--resume={path}", "--json")) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"]["budget"] for row in rows] == ["all", "all", "4", "4"]


def test_what_the_agent_did_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"mmtok:agent_milliseconds_count": 8.0, "mmtok:agent_timeouts_total": 1.0}
    command = ["quality", "--tasks=count", "--methods=mmtok,mmtok+agent", "--budgets=4", "--seeds=0"]
    command += ["--num-questions=8", f"--results-dir={tmp_path}"]
    with serving(says("2"), PRUNES) as url:
        servers = contextlib.nullcontext((url, SimpleNamespace(url=url)))
        monkeypatch.setattr(bench, "_served", lambda *arguments: servers)
        monkeypatch.setattr(bench, "read_counts", lambda server: counts)
        assert main(command) == 1
        assert "1 of 8 questions had no answer of the agent" in capsys.readouterr().err
        (path,) = tmp_path.glob("*.jsonl")
        assert [row.case["method"] for row in read_rows(path)] == ["mmtok"]
        counts["mmtok:agent_timeouts_total"] = 0.0
        assert main([*command, f"--resume={path}"]) == 0
    assert "The agent was asked 8 times" in capsys.readouterr().out
    assert [row.case["method"] for row in read_rows(path)] == ["mmtok", "mmtok+agent"]


@pytest.mark.slow
def test_ctrl_c_keeps_finished_rows(tmp_path: Path) -> None:
    process: subprocess.Popen[bytes]
    pruned: list[str] = []

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if budget_of(body) != "all":
            pruned.append(budget_of(body))
            if len(pruned) == 1:
                process.send_signal(signal.SIGINT)
        return says("yes")(body)

    with serving(reply, PRUNES) as url:
        # A shell's background jobs ignore SIGINT, and hand that down.
        program = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from mmtok_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", program]
        process = subprocess.Popen([*command, *arguments(url, tmp_path)], stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in said
    (path,) = tmp_path.glob("*.jsonl")
    assert {row.case["budget"] for row in read_rows(path)} == {"all"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["setup"], "the same command installs what is missing"),
        (
            ["--tasks=pope", "--budgets=64", "--model-path=m"],
            "the rows of finished budgets are kept, and --resume goes on from them",
        ),
        (["--tasks=count"], "--resume goes on from it"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(lmms_eval, "install", interrupt)
    monkeypatch.setattr(public, "run_public_tasks", interrupt)
    monkeypatch.setattr(bench, "run_pocket_tasks", interrupt)
    assert main(["quality", *arguments]) == 130
    assert said in capsys.readouterr().err


def test_pages_are_asked_of_the_model_that_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "--tasks=pages", "--methods=mmtok", "--budgets=all,25%", "--seeds=0", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"--model-path={pocket_checkpoint('qwen2.5-vl', reads_pages=True)} " in said
    assert "mmtok at 25%: small-text, medium-text, large-text, 170 each" in said
    assert "1020 requests, 8 at a time" in said
    assert main(["quality", "--tasks=large-text", "--methods=mmtok", "--dry-run"]) == 0
    assert "mmtok at 25%: large-text, 170 each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks=pages", "--family=llava-1.5"], "no pocket model of llava-1.5 reads pages, only that of qwen2.5-vl"),
        (["--tasks=pages", "--record"], "--record is for scenes"),
        (["--tasks=pages,count"], "got small-text, medium-text, large-text, count"),
        (["--tasks=pages", "--methods=visionzip"], "qwen2.5-vl does not run visionzip"),
    ],
)
def test_what_cannot_be_asked_about_pages(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", *given, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--methods=even,random", "--budgets=all,4", "--seeds=1"])
def test_what_cannot_be_recorded_is_refused_before_it_is_asked(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "--record", "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["quality", "--record", "--dry-run", given]) == 2
    assert "--record writes mmtok at 25% over several seeds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--methods=mmtok,evs"],
            "evs goes by the frames of a video, and the tasks ask about images: expected some of",
        ),
        (["--methods=frames", "--url=http://127.0.0.1:9"], "frames goes by the frames of a video"),
        (["--methods=evs", "--tasks=gqa", "--budgets=64", "--model-path=."], "evs goes by the frames of a video"),
        (["--methods=visionzip", "--family=qwen2.5-vl"], "qwen2.5-vl does not run visionzip: expected some of mmtok"),
        (
            ["--methods=downsample", "--tasks=gqa", "--budgets=64", "--family=internvl3", "--model-path=."],
            "internvl3 does not run downsample",
        ),
        (
            ["--server-arg=--mmtok-method=evs", "--tasks=gqa", "--budgets=64", "--model-path=."],
            "--server-arg --mmtok-method=evs would change the pruning that the rows name",
        ),
    ],
)
def test_methods_that_cannot_run_are_refused_before_anything_starts(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a server was started")

    for module in (bench, public):
        monkeypatch.setattr(module, "make_server", start)
    assert main(["quality", *given, f"--results-dir={tmp_path / 'new'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
