"""Measures the paper's latency, memory and accuracy on this machine's GPU, in tables with the paper's own figures.

    python -m mmtok_gpu_check.paper --checkpoints /models --dry-run
    python -m mmtok_gpu_check.paper --checkpoints /models

/models holds checkpoints in folders with their names on Hugging Face; missing ones are left out. Steps that succeeded
are not run again. Rows, logs and the page of tables are written to artifacts/paper. The exit code is 0, 1 if a step
failed, 2 for a wrong argument or without a GPU, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mmtok_bench.families import FamilyName
from mmtok_bench.quality.published import BENCHMARKS, PAPER_BUDGETS, PUBLISHED
from mmtok_bench.report.selector import PUBLISHED_MS
from mmtok_bench.report.tables import Table
from mmtok_bench.results import ResultRow, device_name, read_rows, row_files
from mmtok_bench.run import run_command
from mmtok_gpu_check.parts import Part
from mmtok_gpu_check.runs import exit_codes_in, print_parts, run_part

__all__ = ["CHECKPOINTS", "main", "steps_of", "tables"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model of the paper.

    Args:
        folder: The model's name on Hugging Face.
        family: The model's family.
        published: The model's name in the paper.
        image_px: Size of an image with about the paper's number of tokens.
        budget: The budget that the paper's latencies were measured with.
    """

    folder: str
    family: FamilyName
    published: str
    image_px: str
    budget: str

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The benchmarks for which the paper has a score, in its order."""
        scored = {row.benchmark for row in PUBLISHED if row.model == self.published}
        return tuple(name for name in BENCHMARKS if name in scored)


CHECKPOINTS = (
    Checkpoint("Qwen2.5-VL-7B-Instruct", "qwen2.5-vl", "Qwen2.5-VL-7B", "1008x672", "10%"),
    Checkpoint("llava-v1.6-vicuna-7b-hf", "llava-next", "LLaVA-NeXT-7B", "672x672", "160"),
    Checkpoint("llava-v1.6-vicuna-13b-hf", "llava-next", "LLaVA-NeXT-13B", "672x672", "160"),
    Checkpoint("llava-1.5-7b-hf", "llava-1.5", "LLaVA-1.5-7B", "336x336", "64"),
    Checkpoint("llava-1.5-13b-hf", "llava-1.5", "LLaVA-1.5-13B", "336x336", "64"),
)
_NAMES = ", ".join(each.folder for each in CHECKPOINTS)
_MME_TITLE = "Table 12: Qwen2.5-VL-7B on MME"
# Image tokens, method, seconds for all of MME, GB in addition to the weights.
_MME = (
    ("867.6", "unpruned", "675", "3.05"),
    ("86.8", "mmtok", "419", "0.71"),
    ("86.8", "divprune", "423", ""),
    ("86.8", "visionzip", "508", ""),
)
_GIB = 2**30
# A public benchmark of ten thousand questions takes hours.
_TIMEOUT_S = 24 * 3600


def steps_of(checkpoints: Sequence[Checkpoint], folder: Path, lmms_venv: Path) -> list[Part]:
    """Returns the steps to run, the shortest first.

    Args:
        checkpoints: The checkpoints to measure.
        folder: The folder that holds them.
        lmms_venv: Virtual environment of lmms-eval, which is created if it does not exist.
    """
    mmtok, where = ("-m", "mmtok_deploy"), ("--results-dir", "FOLDER")
    selector = (*mmtok, "bench", "selector", "--device", "cuda", *where)
    steps = [Part("selector", _SELECTOR_TITLE, (selector,), timeout_s=_TIMEOUT_S)]
    for each in checkpoints:
        model: tuple[str, ...] = ("--model-path", str(folder / each.folder), "--family", each.family)
        served = (
            *(*mmtok, "bench", "serve", *model, "--budgets", each.budget, "--image-px", each.image_px),
            *("--image-kinds", "photograph", "--prefix-cache", "off", "--concurrency", "1,16", *where),
        )
        steps.append(Part(f"serve-{each.folder}", f"{each.published}: latency", (served,), timeout_s=_TIMEOUT_S))
    if not (lmms_venv / "bin" / "lmms-eval").is_file():
        setup = (*mmtok, "quality", "setup", "--lmms-venv", str(lmms_venv))
        steps.append(Part("lmms-eval", "its virtual environment", (setup,), timeout_s=_TIMEOUT_S))
    for each in checkpoints:
        model = ("--model-path", str(folder / each.folder), "--family", each.family)
        budgets = ",".join(PAPER_BUDGETS[each.family])
        questions: list[tuple[str, ...]] = [("--tasks", name, "--budgets", budgets) for name in each.benchmarks]
        if each.family == "qwen2.5-vl":
            # DivPrune's time, beside MMTok's; VisionZip needs a class token, which this encoder does not have.
            questions.append(("--tasks", "mme", "--methods", "divprune", "--budgets", "10%"))
        commands = tuple(
            (*mmtok, "quality", *question, *model, "--lmms-venv", str(lmms_venv), *where) for question in questions
        )
        steps.append(Part(f"quality-{each.folder}", f"{each.published}: answers", commands, timeout_s=_TIMEOUT_S))
    return steps


_SELECTOR_TITLE = "Table 13: the selection by itself"


def tables(rows: Iterable[ResultRow], folder: Path) -> list[Table]:
    """Returns the paper's tables, with measured figures below the quoted ones.

    Args:
        rows: Rows of `mmtok bench selector`, `mmtok bench serve` and `mmtok quality`.
        folder: The folder of the checkpoints, whose configurations give the size of a token's keys and values.
    """
    rows = list(rows)
    known = {each.folder: each for each in CHECKPOINTS}
    served = [row for row in rows if row.bench == "serve" and row.case["model"] in known]
    asked = [row for row in rows if row.bench == "quality" and Path(str(row.case["model"])).name in known]
    made = [_mme(asked, served, folder), _selector(rows), _latency(served, folder)]
    return [*made, *(_answers(each, asked) for each in CHECKPOINTS)]


def _mme(asked: Sequence[ResultRow], served: Sequence[ResultRow], folder: Path) -> Table:
    name = CHECKPOINTS[0].folder
    lines = [("the paper, RTX A6000", *line, "") for line in _MME]
    for row in asked:
        if (row.case["task"], Path(str(row.case["model"])).name) == ("mme", name):
            budget = "off" if row.case["budget"] == "all" else row.case["budget"]
            like = [each for each in served if (each.case["model"], each.case["budget"]) == (name, budget)]
            like = [each for each in like if each.case["method"] != "downsample" and each.case["concurrency"] == 1]
            kept = f"{like[-1].metrics['image_tokens_kept']:.0f}" if like else str(row.case["budget"])
            memory = _kv_gb(like[-1], folder) if like else ""
            score = f"{row.metrics['score']:.4g}"
            lines.append((row.device, kept, str(row.case["method"]), f"{row.metrics['duration_s']:.0f}", memory, score))
    columns = ("on", "image tokens", "method", "seconds", "GB: the paper's beside the weights, here KV of a request")
    return Table(_MME_TITLE, (*columns, "MME score"), tuple(lines), num_texts=3)


def _selector(rows: Sequence[ResultRow]) -> Table:
    lines = []
    for (num_tokens, num_picks), quoted in PUBLISHED_MS.items():
        case = {"num_tokens": num_tokens, "num_picks": num_picks, "batch": 1}
        found = [row for row in rows if row.bench == "selector" and case.items() <= row.case.items()]
        times = {
            backend: next((row for row in reversed(found) if row.backend == backend), None)
            for backend in ("triton", "dense")
        }
        cells = ("" if row is None else f"{row.metrics['latency_p50_ms']:.3f}" for row in times.values())
        lines.append((f"{num_tokens} → {num_picks}", f"{quoted:.3f}", *cells))
    columns = ("tokens → kept", "the paper, RTX A6000, ms", "here, triton, ms", "here, the published loop, ms")
    return Table(_SELECTOR_TITLE, columns, tuple(lines))


def _latency(served: Sequence[ResultRow], folder: Path) -> Table:
    lines = []
    for row in served:
        if row.case["method"] == "downsample":
            continue
        gains = [row.metrics.get(f"requests_per_s_gain{end}", math.nan) for end in ("", "_low", "_high")]
        gain = "" if any(map(math.isnan, gains)) else "{:.2f}x ({:.2f} to {:.2f})".format(*gains)
        lines.append(
            (
                *(row.device, str(row.case["model"]), str(row.case["budget"]), str(row.case["concurrency"])),
                *(f"{row.metrics['image_tokens_kept']:.0f}", f"{row.metrics['ttft_p50_ms']:.1f}"),
                *(f"{row.metrics['requests_per_s']:.2f}", gain, _kv_gb(row, folder)),
            )
        )
    lines.append(("the paper, H100", "LLaVA-NeXT-13B on POPE", "160", "", "", "", "", "1.87x", ""))
    columns = ("on", "model", "budget", "at once", "image tokens", "TTFT p50, ms", "requests/s", "against unpruned")
    return Table("Latency and memory of a request", (*columns, "KV of a request, GB"), tuple(lines), num_texts=3)


def _answers(checkpoint: Checkpoint, asked: Sequence[ResultRow]) -> Table:
    """Returns a table of a model's scores by benchmark and budget, the paper's first."""
    lines = []
    for budget in PAPER_BUDGETS[checkpoint.family]:
        quoted = {row.benchmark: row for row in PUBLISHED if (row.model, row.budget) == (checkpoint.published, budget)}
        measured = {
            str(row.case["task"]): row
            for row in asked
            if (Path(str(row.case["model"])).name, row.case["budget"]) == (checkpoint.folder, budget)
            and row.case["method"] in ("mmtok", "unpruned")
        }
        paper, ours = [], []
        for name in checkpoint.benchmarks:
            theirs, row = quoted.get(name), measured.get(name)
            paper.append("" if theirs is None else _score(theirs.score, theirs.share))
            metrics = {} if row is None else row.metrics
            score = metrics["score"] * BENCHMARKS[name].factor if metrics else None
            ours.append("" if score is None else _score(score, metrics.get("share", 1.0)))
        lines += [("the paper", budget, *paper), ("here", budget, *ours)]
    columns = ("by", "budget", *checkpoint.benchmarks)
    title = f"Tables 1 and 3: {checkpoint.published}, score and % of the unpruned one"
    return Table(title, columns, tuple(lines), num_texts=2)


def _score(score: float | None, share: float) -> str:
    return f"{100 * share:.1f}%" if score is None else f"{score:.4g} ({100 * share:.1f}%)"


def _kv_gb(row: ResultRow, folder: Path) -> str:
    """Returns the GB of keys and values of a request; empty if the checkpoint is missing."""
    path = folder / str(row.case["model"]) / "config.json"
    if not path.is_file():
        return ""
    text: Any = AutoConfig.from_pretrained(path.parent).get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Keys and values, in half precision.
    num_bytes = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head_width
    return f"{row.metrics['kv_tokens_per_request'] * num_bytes / _GIB:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a step failed, 2 for usage, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="mmtok_gpu_check.paper", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoints", type=Path, required=True, help=f"folder with some of {_NAMES}")
    parser.add_argument("--output", type=Path, default=Path("artifacts/paper"), help="folder (default %(default)s)")
    parser.add_argument("--lmms-venv", type=Path, default=Path("artifacts/lmms-eval"), help="default %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print every command instead of running it")
    arguments = parser.parse_args(argv)
    return run_command("paper", lambda: _run(arguments), stopped="finished steps are kept, and not run again.")


def _run(arguments: argparse.Namespace) -> int:
    checkpoints = [each for each in CHECKPOINTS if (arguments.checkpoints / each.folder / "config.json").is_file()]
    if not checkpoints:
        raise ValueError(f"--checkpoints {arguments.checkpoints} holds none of {_NAMES}")
    steps = steps_of(checkpoints, arguments.checkpoints, arguments.lmms_venv)
    if arguments.dry_run:
        print_parts(steps, arguments.output)
        return 0
    if not torch.cuda.is_available():
        raise ValueError("the paper's figures are of a GPU, and PyTorch sees none here: --dry-run prints the steps")
    for step in steps:
        if exit_codes_in(arguments.output / step.name) != [0] * len(step.commands):
            run_part(step, arguments.output / step.name)
    rows = [row for path in row_files(arguments.output) for row in read_rows(path)]
    page = arguments.output / "paper.md"
    found = tables(rows, arguments.checkpoints)
    title = f"# The paper's tables on {device_name(torch.device('cuda'))}"
    page.write_text("\n\n".join([title, *(table.to_markdown() for table in found)]) + "\n", encoding="utf-8")
    print(f"Written: {page}")
    failed = [step.name for step in steps if any(exit_codes_in(arguments.output / step.name) or [1])]
    if failed:
        print(f"Failed: {', '.join(failed)}; their logs are in {arguments.output}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
