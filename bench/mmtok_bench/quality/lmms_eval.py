"""Runs lmms-eval in a virtual environment of its own, and reads the scores from its results.

Its pinned versions conflict with SGLang's, so it is never imported. Its model `openai` sends requests to a server.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtok_bench.client import MeasurementError

__all__ = ["VERSION", "LmmsEvalError", "LmmsScore", "command_line", "install", "program_of", "run_lmms_eval"]

VERSION = "0.7.3"
"""The version that was tested: task names, model arguments and the format of the results are those of this version."""

# The answer that its model `openai` returns if a request failed (models/chat/openai.py, 0.7.3).
_FAILED = "[LMMS_EVAL_REQUEST_FAILED"
_LOG_END_LINES = 25


class LmmsEvalError(MeasurementError):
    """lmms-eval is not installed, ended without results, or counted a failed request as an answer."""


@dataclass(frozen=True, slots=True)
class LmmsScore:
    """A task's metrics by name, as lmms-eval computed them, and the number of its questions."""

    metrics: Mapping[str, float]
    num_questions: int


def install(folder: Path) -> int:
    """Returns pip's exit code after installing lmms-eval into a virtual environment in `folder`."""
    print(f"Installing lmms-eval {VERSION} into {folder} (with a PyTorch of its own: about 7 GB)")
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return subprocess.run([*pip, f"lmms-eval=={VERSION}"], check=False).returncode


def program_of(folder: Path) -> Path:
    """Returns the path of `lmms-eval` in a virtual environment.

    Raises:
        LmmsEvalError: It is not installed.
    """
    program = folder / "bin" / "lmms-eval"
    if not program.is_file():
        raise LmmsEvalError(f"lmms-eval is not in {folder}: `mmtok quality setup --lmms-venv {folder}` installs it")
    return program


def command_line(
    program: Path,
    tasks: Sequence[str],
    url: str,
    output: Path,
    *,
    num_at_once: int,
    limit: int | None = None,
    include_path: Path | None = None,
) -> list[str]:
    """Returns the command that runs the tasks on the server at `url`, and writes results and answers below `output`.

    Args:
        program: Result of `program_of`.
        tasks: lmms-eval's names.
        url: The server's address, without a path.
        output: A folder.
        num_at_once: Number of concurrent requests.
        limit: Number of questions of each task, the first ones; None for all.
        include_path: A folder of further task files.
    """
    model = {
        "model": "default",
        "base_url": f"{url.rstrip('/')}/v1",
        "api_key": "none",
        "num_concurrent": num_at_once,
        "timeout": 600,
        "max_retries": 1,
        "httpx_trust_env": False,
    }
    return [
        *(str(program), "eval", "--model", "openai", "--tasks", ",".join(tasks), "--batch_size", "1"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in model.items())),
        *("--output_path", str(output), "--log_samples"),
        *(["--limit", str(limit)] if limit is not None else []),
        *(["--include_path", str(include_path)] if include_path is not None else []),
    ]


def run_lmms_eval(command: Sequence[str], tasks: Sequence[str], output: Path) -> dict[str, LmmsScore]:
    """Returns the scores by task, after running `command_line`'s command with its output in `output`/lmms-eval.log.

    Raises:
        LmmsEvalError: No results, or failed requests among the answers.
    """
    output.mkdir(parents=True, exist_ok=True)
    log_path = output / "lmms-eval.log"
    with log_path.open("wb") as log:
        # PYTHONPATH would add libraries of this environment, which do not fit those of lmms-eval.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    # Its exit code is 0 after an exception, too: only the results show that it worked.
    found = sorted(output.rglob("*_results.json"))
    if not found:
        raise LmmsEvalError(_why(code, log_path.read_text(encoding="utf-8", errors="replace"), tasks))
    results = json.loads(found[-1].read_text(encoding="utf-8"))
    _check_answers(output)
    return {task: _score(results, task) for task in tasks}


def _why(code: int, log: str, tasks: Sequence[str]) -> str:
    end = "\n".join(log.rstrip().splitlines()[-_LOG_END_LINES:])
    named = ", ".join(tasks)
    if any(
        sign in log
        for sign in ("ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "DatasetNotFound")
    ):
        return (
            f"the data of {named} are missing: lmms-eval takes them from the Hugging Face hub. Run it where the hub "
            "can be reached, or download the data sets there and copy the folder that `HF_HOME` names, or name "
            f"local task files by --include-path. The end of lmms-eval's output:\n{end}"
        )
    return f"lmms-eval wrote no results for {named} (exit status {code}). The end of its output:\n{end}"


def _check_answers(output: Path) -> None:
    for path in output.rglob("*_samples_*.jsonl"):
        num_failed = sum(_FAILED in line for line in path.read_text(encoding="utf-8").splitlines())
        if num_failed:
            raise LmmsEvalError(
                f"{num_failed} requests failed, and lmms-eval counts a failed one as a wrong answer: its scores are "
                f"left out. {path} has the answers; the server's log may say why."
            )


def _score(results: Mapping[str, Any], task: str) -> LmmsScore:
    if task not in results["results"]:
        raise LmmsEvalError(f"lmms-eval's results have no {task}, but {', '.join(results['results'])}")
    metrics = {}
    for key, value in results["results"][task].items():
        name, _, filtered = key.partition(",")
        if filtered == "none" and isinstance(value, int | float) and "_stderr" not in name:
            metrics[name] = float(value)
    samples = results.get("n-samples", {}).get(task, {})
    return LmmsScore(metrics, int(samples.get("effective", 0)))
