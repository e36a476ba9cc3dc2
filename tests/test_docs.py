"""What the pages say to type runs as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtok_deploy.cli import main

DOCS = Path(__file__).parents[1] / "docs"
GPU = "# needs an NVIDIA GPU\n"


def blocks(page: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def run_exports(page: str) -> None:
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            if line.startswith("mmtok export selection"):
                assert main(shlex.split(line, comments=True)[1:]) == 0


def pages() -> list[Path]:
    root = DOCS.parent
    of_folders = [path for folder in ("bench", "docs", "examples", ".github") for path in (root / folder).rglob("*.md")]
    return [*root.glob("*.md"), *of_folders]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_exporting_and_onnx_runtime(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    run_exports("export.md")
    said = capsys.readouterr().out
    (shown,) = [block for block in blocks("export.md", "") if block.startswith("selection.onnx")]
    version = re.compile(r"onnxruntime [\d.]+")
    assert version.sub("", said).startswith(version.sub("", shown))
    names: dict[str, Any] = {}
    for block in blocks("export.md", "python"):
        if not block.startswith(GPU):
            exec(compile(block, "docs/export.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("(1, 64) (1, 64, 4096)\nonnxruntime ")


def test_attaching(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("export.md", "bash") for line in block.replace("\\\n", "").splitlines()]
    commands = [line for line in lines if line.startswith("mmtok export attach")]
    assert len(commands) == 2
    for command in commands:
        # As far as it can go here: everything is said but for the file itself.
        assert main(shlex.split(command)[1:]) == 2
        assert capsys.readouterr().err == "mmtok export: visual.onnx does not exist\n"


def test_reporting(folder: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    (first, *_) = blocks("report.md", "bash")
    for line in first.splitlines():
        assert main(shlex.split(line)[1:]) == 0
    assert "fastest backend" in (folder / "artifacts" / "bench" / "report.md").read_text()
    assert (folder / "artifacts" / "bench" / "report.html").is_file()


def test_quality(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("quality.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mmtok quality")]
    plans = [command for command in commands if command != ["quality", "setup"]]
    assert len(plans) == len(commands) - 1 > 5
    for command in plans:
        assert main([*command, "--dry-run"]) == 0, capsys.readouterr().err
    # What the page says that `make quality` asks.
    assert main(["quality", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("134640 requests")
    assert "134,640 questions: 13 methods at 5 budgets" in (DOCS / "quality.md").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensorrt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    run_exports("export.md")
    (block,) = [block for block in blocks("export.md", "python") if block.startswith(GPU)]
    exec(compile(block, "docs/export.md", "exec"), {})
    assert re.search(r"\[\[\d+(, \d+){63}\]\]", capsys.readouterr().out)
