"""The example that asks a server, on the servers that the other tests use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmtok_deploy.photographs import photograph
from tests.runtime.serving import Served

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_and_ask.py"


@pytest.mark.slow
def test_a_smaller_budget_is_a_shorter_prompt(served: Served, tmp_path: Path) -> None:
    photograph("chelsea").save(tmp_path / "cat.png")
    command = [sys.executable, str(EXAMPLE), "--url", served.server.url, "--image", str(tmp_path / "cat.png")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    found = [re.match(r" *(\S+): +(\d+) prompt tokens: ", line) for line in lines]
    assert [each and each[1] for each in found] == ["all", "25%", "10%"]
    unpruned, quarter, tenth = (int(each[2]) for each in found if each)
    assert unpruned > quarter > tenth
