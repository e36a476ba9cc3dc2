from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from mmtok_bench.report.tables import Table
from mmtok_bench.results import ResultRow, append_row
from mmtok_deploy.cli import main as mmtok
from mmtok_gpu_check.paper import CHECKPOINTS, main, tables
from mmtok_gpu_check.parts import Part
from mmtok_gpu_check.runs import DONE
from tests.bench.report.rows import GPU, row, serve_case, serve_metrics

QWEN = "Qwen2.5-VL-7B-Instruct"
# As the checkpoint has it: 57,344 bytes a token.
CONFIG = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}


def checkpoint(folder: Path, name: str) -> Path:
    Qwen2_5_VLConfig(text_config=CONFIG).save_pretrained(folder / name)
    return folder


def measured() -> list[ResultRow]:
    rows = []
    for budget, kept, gains in (("off", 864, {}), ("10%", 86, {"": 2.0, "_low": 1.9, "_high": 2.1})):
        case = serve_case(budget, "none" if budget == "off" else "mmtok", model=QWEN)
        metrics = serve_metrics(864, kept, 1, 0.0) | {f"requests_per_s_gain{end}": gain for end, gain in gains.items()}
        rows.append(row("serve", case, metrics, device=GPU))
    for method, budget, score, more in (("unpruned", "all", 2300.0, {}), ("mmtok", "10%", 2070.0, {"share": 0.9})):
        case = {"task": "mme", "kind": "public", "method": method, "budget": budget, "model": f"/models/{QWEN}"}
        rows.append(row("quality", case, {"score": score, "duration_s": 500.4, **more}, device=GPU))
    case = {"num_tokens": 2880, "num_picks": 160, "num_words": 24, "batch": 1}
    for backend, milliseconds in (("triton", 1.1), ("dense", 20.7)):
        rows.append(row("selector", case, {"latency_p50_ms": milliseconds}, backend=backend, device=GPU))
    return rows


def table_of(found: list[Table], title: str) -> Table:
    return next(table for table in found if table.title.startswith(title))


def test_what_was_measured_stands_beside_what_the_paper_says(tmp_path: Path) -> None:
    found = tables(measured(), checkpoint(tmp_path, QWEN))
    mme = table_of(found, "Table 12").rows
    assert mme[0][:4] == ("the paper, RTX A6000", "867.6", "unpruned", "675")
    # 46 tokens of text and answer beside the image's.
    assert mme[-2:] == (
        (GPU, "864", "unpruned", "500", f"{910 * 57344 / 2**30:.3f}", "2300"),
        (GPU, "86", "mmtok", "500", f"{132 * 57344 / 2**30:.3f}", "2070"),
    )
    selection = {line[0]: line[1:] for line in table_of(found, "Table 13").rows}
    assert selection["2880 → 160"] == ("6.417", "1.100", "20.700")
    assert selection["576 → 16"] == ("0.774", "", "")
    latency = table_of(found, "Latency").rows
    assert latency[1][-2] == "2.00x (1.90 to 2.10)"
    answers = table_of(found, "Tables 1 and 3: Qwen2.5-VL-7B")
    lines = {line[:2]: line[answers.columns.index("mme")] for line in answers.rows}
    assert lines["the paper", "10%"] == "2051 (88.1%)"
    assert lines["here", "10%"] == "2070 (90.0%)"
    assert lines["here", "5%"] == ""


def test_nothing_measured_leaves_the_papers_figures_alone(tmp_path: Path) -> None:
    found = tables([], tmp_path)
    assert len(found) == 3 + len(CHECKPOINTS)
    assert all(line[0] != "here" or not any(line[2:]) for table in found[3:] for line in table.rows)


def test_a_dry_run_prints_steps_that_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(checkpoint(tmp_path, QWEN), "llava-1.5-7b-hf")
    assert main(["--checkpoints", str(folder), "--dry-run"]) == 0
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert not any("FOLDER" in command for command in commands)
    assert {word for command in commands for word in command if str(folder) in word} == {
        *(f"{folder}/{name}" for name in (QWEN, "llava-1.5-7b-hf")),
    }
    kinds = [command[3:5] for command in commands]
    assert kinds[0] == ["bench", "selector"]
    assert kinds.count(["bench", "serve"]) == 2
    assert kinds.count(["quality", "setup"]) == 1
    for command in commands:
        if "setup" not in command and "selector" not in command and "serve" not in command:
            assert mmtok([*command[3:], "--dry-run"]) == 0


def test_steps_are_run_once_and_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run_part(step: Part, folder: Path) -> None:
        ran.append(step.name)
        folder.mkdir(parents=True)
        code = int(step.name.startswith("quality"))
        (folder / DONE).write_text(json.dumps({"exit_codes": [code] * len(step.commands)}))
        if step.name == "selector":
            append_row(folder / "rows.jsonl", measured()[-1])

    monkeypatch.setattr("mmtok_gpu_check.paper.run_part", run_part)
    monkeypatch.setattr("mmtok_gpu_check.paper.device_name", lambda _: GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = ["--checkpoints", str(checkpoint(tmp_path / "models", QWEN)), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert ran == ["selector", f"serve-{QWEN}", "lmms-eval", f"quality-{QWEN}"]
    assert f"Failed: quality-{QWEN}" in capsys.readouterr().err
    assert "| 2880 → 160 | 6.417 |  | 20.700 |" in (tmp_path / "out" / "paper.md").read_text()
    # What failed alone is run again.
    (tmp_path / "out" / f"quality-{QWEN}" / DONE).unlink()
    (tmp_path / "out" / f"quality-{QWEN}").rmdir()
    assert main(arguments) == 1
    assert ran[4:] == [f"quality-{QWEN}"]


def test_without_checkpoints_or_a_gpu_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoints", str(tmp_path)]) == 2
    assert "holds none of Qwen2.5-VL-7B-Instruct" in capsys.readouterr().err
    if not torch.cuda.is_available():
        checkpoint(tmp_path, QWEN)
        assert main(["--checkpoints", str(tmp_path)]) == 2
        assert "--dry-run prints the steps" in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists()
