"""Result rows of benchmarks, with case, machine and metrics; and files of rows."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_origin, get_type_hints

import torch

from mmtok_deploy import __version__

__all__ = [
    "LATENCIES",
    "SCHEMA",
    "STAGES",
    "CaseValue",
    "ResultRow",
    "UnfinishedRowWarning",
    "append_row",
    "current_commit",
    "device_name",
    "drop_unfinished_line",
    "make_latency_row",
    "make_row",
    "new_result_file",
    "read_rows",
    "row_files",
]

SCHEMA = 2
"""A later version may add fields, which this one skips; a change of a field's meaning raises the number."""

CaseValue = int | float | str

LATENCIES = ("latency_p20_ms", "latency_p50_ms", "latency_p80_ms")
"""The metrics of `make_latency_row`."""
STAGES = (
    *("image_decode_ms", "image_preprocess_ms", "image_hash_ms", "image_transport_ms"),
    *("vision_encoder_ms", "selection_ms", "language_prefill_ms"),
)
"""The metrics of a server's stages, which are the measured parts of the time to first token."""
_LIBRARIES = ("sglang", "triton", "transformers", "onnxruntime")


class UnfinishedRowWarning(UserWarning):
    """The last line of a file is incomplete, since its writer was killed; the rows before it are read."""


@dataclass(frozen=True, slots=True)
class ResultRow:
    """The result of one benchmark for one backend and one case.

    Args:
        bench: Name of the benchmark, such as "selector".
        case: What was measured; each benchmark has keys of its own.
        backend: What computed it.
        metrics: Values by name; the name ends in the unit. A metric that was not measured is absent, never NaN.
        num_runs: Number of runs, or requests, behind the metrics.
        device: Name of the processor or the accelerator.
        num_threads: PyTorch's threads on the CPU.
        versions: Versions of Python, mmtok-deploy and the libraries that matter.
        commit: Commit of the checkout, with "+" if files differ from it; empty outside a checkout.
        time: When it was measured, ISO 8601, UTC.
        schema: Version of this format.

    Raises:
        ValueError: A metric is not a finite number, or a value of the case is neither a number nor a text.
    """

    bench: str
    case: Mapping[str, CaseValue]
    backend: str
    metrics: Mapping[str, float]
    num_runs: int
    device: str
    num_threads: int
    versions: Mapping[str, str]
    commit: str
    time: str
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(
                    f"metric {name} is a finite number, or absent where it was not measured: got {value!r}"
                )
        for name, part in self.case.items():
            if isinstance(part, bool) or not isinstance(part, int | float | str):
                raise ValueError(f"a case's {name} is a number or a text, got {part!r}")


def make_row(
    bench: str,
    case: Mapping[str, CaseValue],
    backend: str,
    metrics: Mapping[str, float],
    *,
    num_runs: int,
    device: torch.device,
    num_threads: int | None = None,
) -> ResultRow:
    """Returns a row of `metrics`, with device, versions, commit and time filled in.

    `num_threads` is for work of another process; None is PyTorch's number in this process.
    """
    return ResultRow(
        bench=bench,
        case=dict(case),
        backend=backend,
        metrics=dict(metrics),
        num_runs=num_runs,
        device=device_name(device),
        num_threads=torch.get_num_threads() if num_threads is None else num_threads,
        versions=_versions(device),
        commit=current_commit(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def make_latency_row(
    bench: str,
    case: Mapping[str, CaseValue],
    backend: str,
    times_ms: Sequence[float],
    device: torch.device,
    more: Mapping[str, float] | None = None,
) -> ResultRow:
    """Returns a row of the 20th, 50th and 80th percentiles of `times_ms`, which has at least two runs.

    `more` are further metrics.
    """
    quintiles = statistics.quantiles(times_ms, n=5, method="inclusive")
    metrics = dict(zip(LATENCIES, (quintiles[0], statistics.median(times_ms), quintiles[3]), strict=True))
    return make_row(bench, case, backend, metrics | dict(more or {}), num_runs=len(times_ms), device=device)


def new_result_file(folder: Path, bench: str) -> Path:
    """Creates an empty file `<bench>-<time>.jsonl` in `folder`; older files are never changed."""
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
    """Appends the row to the file and syncs it to disk, so that it survives a crash."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def drop_unfinished_line(path: Path) -> bool:
    """Removes a last line without a line end, which the next row would be joined to; returns whether there was one."""
    text = path.read_bytes()
    num_whole = text.rfind(b"\n") + 1
    if num_whole < len(text):
        os.truncate(path, num_whole)
    return num_whole < len(text)


def read_rows(path: Path) -> list[ResultRow]:
    """Returns the rows of a file.

    Warns:
        UnfinishedRowWarning: The last line is incomplete; the rows before it are returned.

    Raises:
        ValueError: A line is not a row, or has a schema that this version does not know; the message has its number.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
        except ValueError:
            # Only a row whose process was killed while writing has no end of line.
            if number == len(lines) and not line.endswith("\n"):
                warnings.warn(f"{path}:{number} was cut off and is skipped", UnfinishedRowWarning, stacklevel=2)
                continue
            raise ValueError(f"{path}:{number} is no JSON, expected a result row: {line.strip()[:60]!r}") from None
        try:
            rows.append(_parse_row(fields))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no result row: {error}") from error
    return rows


def row_files(folder: Path) -> list[Path]:
    """Returns the files of rows below a folder: all .jsonl files, except those in a run's folder of logs.

    Such a folder, `x/` beside `x.jsonl`, holds output of other programs.
    """

    def is_of_a_run(path: Path) -> bool:
        between = path.parents[: len(path.relative_to(folder).parts) - 1]
        return any(each.with_name(f"{each.name}.jsonl").is_file() for each in between)

    return [path for path in sorted(folder.rglob("*.jsonl")) if not is_of_a_run(path)]


def _parse_row(values: object) -> ResultRow:
    if not isinstance(values, dict) or "schema" not in values:
        raise ValueError("expected a JSON object with a schema")
    if values["schema"] != SCHEMA or isinstance(values["schema"], bool):
        raise ValueError(f"its schema is {values['schema']!r}, this version of mmtok-deploy reads {SCHEMA}")
    missing = [field for field in _FIELD_TYPES if field not in values]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    for field, expected in _FIELD_TYPES.items():
        if not isinstance(values[field], expected):
            raise ValueError(
                f"its {field} is {values[field]!r}, expected {'dict' if expected is Mapping else expected.__name__}"
            )
    return ResultRow(**{field: values[field] for field in _FIELD_TYPES})


_FIELD_TYPES: dict[str, type] = {name: get_origin(kind) or kind for name, kind in get_type_hints(ResultRow).items()}


def device_name(device: torch.device) -> str:
    """Returns the name of the device; for a CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor() or platform.machine()}, {cores} cores"


def _versions(device: torch.device) -> dict[str, str]:
    versions = {"python": platform.python_version(), "mmtok-deploy": __version__, "torch": torch.__version__}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return versions


@cache
def current_commit() -> str:
    """Returns the commit of the checkout when this is first called, with "+" if files differ; empty outside of one.

    A process runs the code that it has imported, so later commits are not those of its rows.
    """
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
