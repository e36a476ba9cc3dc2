"""Each example runs as its first lines say; `serve_and_ask.py` does in `tests/runtime/test_serving_examples.py`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example in this process, which has PyTorch; returns the lines that it prints."""

    def run_example(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_example


def test_every_example_is_run_by_a_test() -> None:
    tested = {"select_tokens.py", "compare_methods.py", "export_and_run.py", "serve_and_ask.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_selecting_tokens(run: Run) -> None:
    lines = run("select_tokens.py")
    assert lines[0].startswith("57 of 576 tokens cover ")
    assert lines[1:] == ["a budget of 20 is a prefix: True", "kept rows: (57, 4096)", "a batch: [64, 43]"]


def test_comparing_methods(run: Run) -> None:
    shares = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in run("compare_methods.py")[1:]}
    assert len(shares) == 9
    assert max(shares, key=shares.__getitem__) == "mmtok"


def test_exporting_and_running(run: Run, tmp_path: Path) -> None:
    lines = run("export_and_run.py", "--output", str(tmp_path / "selection.onnx"))
    assert lines[-1] == "tokens for the language model: (1, 64, 4096)"
    assert (tmp_path / "selection.onnx").is_file()
