"""What `make` runs, as it says when asked for a rehearsal."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mmtok_export.targets import RTX_TARGETS

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def recipe(*arguments: str) -> list[str]:
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.replace("\\\n", "").splitlines()


def exports(lines: list[str]) -> list[str]:
    found = [line for line in lines if "mmtok export selection" in line]
    assert len(found) == 3
    return found


def said(lines: list[str]) -> str:
    return subprocess.run(["sh", "-c", lines[-1]], capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("target", sorted(RTX_TARGETS))
def test_engines_of_every_target_that_they_are_built_for_anywhere(target: str) -> None:
    lines = recipe("export", f"TARGET={target}")
    assert all(f"--tensorrt --target {target} " in line for line in exports(lines))
    assert said(lines) == ""


@pytest.mark.parametrize("target", ["7.5", "9.0", "10.0"])
def test_onnx_files_alone_for_other_gpus(target: str) -> None:
    lines = recipe("export", f"TARGET={target}")
    assert not any("--tensorrt" in line for line in exports(lines))
    assert said(lines) == (
        f"No engines: TensorRT-RTX builds none for {target}. On that GPU: "
        ".venv/bin/pip install -e '.[tensorrt]' && make export ENGINES=--tensorrt\n"
    )


def test_engines_on_such_a_gpu() -> None:
    lines = recipe("export", "TARGET=9.0", "ENGINES=--tensorrt")
    assert all("--tensorrt --preset" in line for line in exports(lines))
    assert said(lines) == ""


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], ".venv/bin/mmtok soak --minutes 5"),
        (["MINUTES=30", "ROWS=fuzz,storm"], ".venv/bin/mmtok soak --minutes 30 --rows fuzz,storm"),
    ],
)
def test_soak_takes_minutes_and_rows(arguments: list[str], command: str) -> None:
    assert recipe("soak", *arguments)[-1].strip() == command
