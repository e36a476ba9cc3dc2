"""One row of a benchmark: what was measured, on what, and how long it took."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from mmtok_deploy import __version__

__all__ = ["SCHEMA", "ResultRow", "append_row", "device_name", "make_row", "new_result_file", "read_rows"]

SCHEMA = 1
"""A later version may add fields; one that changes their meaning counts up."""

CaseValue = int | float | str


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One backend on one case.

    Args:
        bench: Which benchmark, such as "selector".
        case: What was measured; the keys are the benchmark's own.
        backend: What computed it.
        p20_ms: The time that a fifth of the runs did not exceed; p50_ms, p80_ms likewise.
        num_runs: Runs timed.
        device: The processor's or the accelerator's name.
        num_threads: PyTorch's threads on the CPU.
        versions: Of Python, mmtok-deploy and the libraries that matter.
        commit: Of the checkout, with "+" where files differ from it; empty outside one.
        time: When it was measured, ISO 8601, UTC.
        schema: The version of this form.
    """

    bench: str
    case: Mapping[str, CaseValue]
    backend: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    num_runs: int
    device: str
    num_threads: int
    versions: Mapping[str, str]
    commit: str
    time: str
    schema: int = SCHEMA


def make_row(
    bench: str, case: Mapping[str, CaseValue], backend: str, times_ms: Sequence[float], device: torch.device
) -> ResultRow:
    """Returns the row of `times_ms`, at least two runs, with what can be known of this machine."""
    quintiles = statistics.quantiles(times_ms, n=5, method="inclusive")
    return ResultRow(
        bench=bench,
        case=dict(case),
        backend=backend,
        p20_ms=quintiles[0],
        p50_ms=statistics.median(times_ms),
        p80_ms=quintiles[3],
        num_runs=len(times_ms),
        device=device_name(device),
        num_threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), "mmtok-deploy": __version__, "torch": torch.__version__},
        commit=_commit(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def new_result_file(folder: Path, bench: str) -> Path:
    """Returns a new, empty file `<bench>-<time>.jsonl` in `folder`; older files are never touched."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{bench}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    for number in range(1000):
        path = folder / (f"{stem}.jsonl" if not number else f"{stem}-{number}.jsonl")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{folder} holds a thousand results of this second")


def append_row(path: Path, row: ResultRow) -> None:
    """Writes the row as the file's next line, at once: what was measured survives what comes after."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[ResultRow]:
    """Returns the rows of a file.

    Raises:
        ValueError: A row of another schema.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    others = {row.get("schema") for row in rows} - {SCHEMA}
    if others:
        raise ValueError(f"{path} holds rows of schema {', '.join(map(str, others))}, this version reads {SCHEMA}")
    return [ResultRow(**row) for row in rows]


def device_name(device: torch.device) -> str:
    """Returns what the device is called, with the number of cores that this process may use of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor() or platform.machine()}, {cores} cores"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
