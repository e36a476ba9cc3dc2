"""How the Triton backend is tested: under the interpreter, compiled for every GPU generation, and on a GPU.

Triton decides when a kernel is decorated whether to interpret it, for the whole process. So `test_interpreted.py` runs
in a process of its own, with TRITON_INTERPRET=1, started by its first test; each test then shows its outcome there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmtok_deploy.backends.triton_plan import plan

INTERPRETED_FILE = "test_interpreted.py"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REPORT_VARIABLE = "INTERPRETED_TESTS_REPORT"

OUTCOMES = pytest.StashKey[dict[str, dict[str, str]]]()
RESOURCES = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.path.name != INTERPRETED_FILE or IS_INTERPRETED:
        return None
    outcomes = pyfuncitem.config.stash.setdefault(OUTCOMES, {})
    if not outcomes:
        outcomes.update(_run_interpreted(pyfuncitem.session))
    outcome = outcomes.get(pyfuncitem.nodeid, {"outcome": "failed", "text": outcomes["output"]["text"]})
    if outcome["outcome"] == "failed":
        pytest.fail(outcome["text"], pytrace=False)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    return True


def _run_interpreted(session: pytest.Session) -> dict[str, dict[str, str]]:
    tests = [item.nodeid for item in session.items if item.path.name == INTERPRETED_FILE]
    report = Path(tempfile.gettempdir(), f"interpreted-tests-{os.getpid()}")
    environment = os.environ | {"TRITON_INTERPRET": "1", REPORT_VARIABLE: str(report)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=session.config.rootpath, env=environment, capture_output=True, text=True)
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    report.unlink(missing_ok=True)
    outcomes = {line["nodeid"]: line for line in map(json.loads, lines)}
    return outcomes | {
        "output": {"text": f"did not run; the process ended with {run.returncode}:\n{run.stdout[-4000:]}"}
    }


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(REPORT_VARIABLE)
    if path and IS_INTERPRETED and (report.when == "call" or report.outcome != "passed"):
        line = {"nodeid": report.nodeid, "outcome": report.outcome, "text": report.longreprtext}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(RESOURCES, [])
    if rows:
        terminalreporter.section("Triton kernels as compiled")
        for row in rows:
            terminalreporter.write_line(row)


@pytest.fixture(autouse=True)
def new_plans() -> Iterator[None]:
    """Tests change what plans are made from."""
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.fixture
def resources(request: pytest.FixtureRequest) -> list[str]:
    """Lines for the table at the end of the test run."""
    return request.config.stash.setdefault(RESOURCES, [])
