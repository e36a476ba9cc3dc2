from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mmtok_deploy.cli import main
from mmtok_deploy.manifest import Manifest

SMALL = ["--budget=4", "--tokens=16", "--text-tokens=3", "--vision-width=8", "--keys-width=6", "--dtype=float32"]


def export(*arguments: str) -> int:
    try:
        return main(["export", *arguments])
    except SystemExit as usage_error:
        return int(usage_error.code or 0)


def test_selection_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "a.onnx"
    assert export("selection", *SMALL, f"--output={path}") == 0
    said = capsys.readouterr().out
    assert re.match(
        rf"{re.escape(str(path))}  \d\d kB, keeps 4 tokens, lazy; B 1, N 16, M 3\n  check passed: 8 picks", said
    )
    assert export("check", str(path)) == 0
    assert capsys.readouterr().out == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_engine_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert export("selection", *SMALL, f"--output={tmp_path}/a.onnx", "--tensorrt", "--target=sm86") == 0
    engine = tmp_path / "a.sm86.rtx.engine"
    assert Manifest.load(engine).details["compute_capabilities"] == ["8.6"]
    assert export("check", str(engine)) == 1
    said = capsys.readouterr()
    assert "check not run: no NVIDIA GPU was at hand" in said.out
    assert "was not checked" in said.err


def test_constants_of_a_preset_and_of_flags(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    arguments = ["--budget=25%", "--tokens=16", "--preset=qwen2.5-vl", "--alpha=2", "--form=loop"]
    assert export("selection", *arguments, f"--output={path}") == 0
    manifest = Manifest.load(path)
    constants = manifest.constants
    assert (constants.tv_temp, constants.vv_temp, constants.alpha, constants.coverage) == (0.01, 0.2, 2, "multimodal")
    assert (manifest.budget, manifest.form) == (4, "loop")
    assert [(each.name, each.dtype, each.shape[-1]) for each in manifest.inputs[:3]] == [
        ("vision", "float16", 3584),
        ("keys", "float32", 1280),
        ("text", "float16", 3584),
    ]


def test_where_it_goes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--budget=4", "--tokens=8:16", "--vision-width=8", "--keys-width=6"]
    assert export("selection", *arguments) == 0
    assert sorted(path.name for path in (tmp_path / "artifacts/export").iterdir()) == [
        "selection-llava-1.5-n8-16-k4.onnx",
        "selection-llava-1.5-n8-16-k4.onnx.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget=20"], "keeps 20 tokens needs images of at least as many, got 16"),
        (["--budget=all"], "a budget of all tokens needs no selection"),
        (["--budget=10%", "--tokens=8:16"], "needs a fixed number of tokens, got 8:16"),
        (["--budget=-4"], "budget '-4' is not understood"),
        (["--tokens=16:8"], "MIN <= OPTIMUM <= MAX, got 16:8:8"),
        (["--text-tokens=0"], "1 <= MIN"),
        (["--tv-temp=0"], "tv_temp is a positive number, got 0.0"),
        (["--target=8.6"], "--target is for an engine: add --tensorrt"),
        (["--tensorrt", "--target=x"], "a compute capability is written 8.6 or sm86, got 'x'"),
        (["--tensorrt", "--target=10.0"], "no engines for compute capability 10.0"),
        (["--tensorrt", "--target=7.5"], "no engines for compute capability 7.5 (for 7.5 it multiplies no float32"),
        (["--tensorrt=tensorrt-rtx", "--target=9.0"], "no engines for compute capability 9.0"),
        (["--tensorrt=tensorrt", "--target=8.6"], "TensorRT builds for the GPU at hand alone, not for 8.6"),
        (["--tensorrt", "--target=8.6", "--tokens=4000", "--budget=4000"], "TensorRT keeps at most 3840 tokens"),
        (["--vision-width=0"], "vision_width is at least 1, got 0"),
        (["--form=scan"], "invalid choice"),
    ],
)
def test_usage_errors_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("selection", *SMALL, f"--output={tmp_path}/a.onnx", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("selection", *SMALL, f"--output={exported}") == 2
    assert "is there already: choose another --output, or --force to replace it" in capsys.readouterr().err
    assert export("selection", *SMALL, f"--output={exported}", "--force") == 0


def test_check_refuses_a_file_that_changed(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported.write_bytes(exported.read_bytes() + b"x")
    assert export("check", str(exported)) == 2
    assert "export it again" in capsys.readouterr().err


def test_check_finds_a_wrong_answer(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Manifest.path_of(exported)
    values = json.loads(path.read_text())
    values["constants"]["vv_temp"] = 0.9
    path.write_text(json.dumps(values))
    assert export("check", str(exported)) == 1
    assert "mmtok export: " in capsys.readouterr().err


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mmtok_export.check", None)
    assert export("check", "a.onnx") == 1
    assert "pip install 'mmtok-deploy[export]'" in capsys.readouterr().err
