"""Runs `mmtok bench serve`."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from mmtok_bench.dummy_models import DUMMY_ARGUMENTS, make_processor, write_dummy_model
from mmtok_bench.internvl_parts import InternVLProcessor
from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.run import Run, quiet_transformers, run_command
from mmtok_bench.serve.image_tokens import count_image_tokens, downsampled_px
from mmtok_bench.serve.load import LoadGenerator, load_command
from mmtok_bench.serve.measure import ModelRun, load_of
from mmtok_bench.serve.plan import Side, Turn, are_side_by_side, plan_cases, plan_turns, sides_of
from mmtok_bench.serve.presets import ServedModel, ServePlan, Size, plan_of
from mmtok_bench.serve.rows import BENCH, known_case
from mmtok_bench.server import ServerPool, SglangServer, make_server
from mmtok_deploy.budget import Budget

__all__ = ["run_serve_bench", "side_server"]

_START_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class _Part:
    """One model with the prefix cache on or off: its servers, and the turns to measure."""

    model: ServedModel
    model_path: Path
    sides: list[Side]
    turns: list[Turn]


def run_serve_bench(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok bench serve`: 1 if a check, a server or a request failed.

    Rows are written at once; after Ctrl-C, also those of cases with a finished round. All servers are stopped.
    """
    return run_command("mmtok bench serve", lambda: _run(arguments))


def side_server(plan: ServePlan, model: ServedModel, model_path: Path, folder: Path, side: Side) -> SglangServer:
    """Returns a server, not started yet; two sides of a model differ only in `side.arguments`."""
    stem = f"{model.name}-{side.budget.replace('%', 'pct')}-prefix-cache-{side.prefix_cache}"
    return make_server(
        model_path,
        model.family,
        *("--enable-metrics", "--enable-cache-report"),
        *plan.arguments,
        *(model.beside_others if are_side_by_side(plan, model) else ()),
        *plan.user_arguments,
        *(DUMMY_ARGUMENTS if model.model_path is None else ()),
        *side.arguments,
        on_cpu=plan.device == "cpu",
        log_path=folder / "logs" / f"{stem}.log",
        start_timeout_s=_START_TIMEOUT_S,
    )


def _run(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    plan = plan_of(arguments, torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    parts = list(_parts(plan, arguments.results_dir))
    if arguments.dry_run:
        _print_commands(plan, parts, arguments.results_dir / "run")
        return 0
    run = Run(BENCH, arguments.results_dir, resume=arguments.resume, json_output=arguments.json)
    parts = [replace(part, turns=_left(plan, part, run)) for part in parts]
    try:
        num_steps = sum(len(turn.cases) for part in parts for turn in part.turns)
        with run.steps(num_steps), LoadGenerator() as generator:
            for part in parts:
                _run_part(plan, part, generator, run)
    finally:
        run.show()
    return 1 if run.failures else 0


def _parts(plan: ServePlan, results_dir: Path) -> Iterator[_Part]:
    for model in plan.models:
        if model.model_path is None:
            processor, path = make_processor(model.name), results_dir / "models" / model.name
        else:
            path = Path(model.model_path)
            processor = _read_processor(path, model)
        # Cached, since it is the same for every load and a processor is slow.
        smaller_px = cache(partial(_smaller_px, processor, model))
        for prefix_cache in plan.prefix_caches:
            cases = plan_cases(model, plan, prefix_cache, smaller_px)
            if not cases:
                raise ValueError(
                    "with the prefix cache on, or several questions an image, there are no random images: "
                    "--image-kinds photograph"
                )
            turns = plan_turns(cases, rounds=plan.rounds, side_by_side=are_side_by_side(plan, model))
            yield _Part(model, path, sides_of(model, prefix_cache, one_server=plan.one_server), turns)


def _read_processor(path: Path, model: ServedModel) -> Any:
    if model.family == "internvl3":  # published with a tokenizer and no processor
        return InternVLProcessor(transformers.AutoTokenizer.from_pretrained(path))
    return transformers.AutoProcessor.from_pretrained(path)


def _smaller_px(processor: Any, model: ServedModel, size_px: Size, budget: str) -> Size | None:
    if MixedBudget.parse(budget).encodes_less:
        # The counterpart of such a budget is one of the whole image.
        return None
    num_tokens = count_image_tokens(processor, size_px)
    num_kept = Budget.parse(budget).num_kept(num_tokens)
    return None if num_kept == num_tokens else downsampled_px(processor, model.family, size_px, num_kept)


def _left(plan: ServePlan, part: _Part, run: Run) -> list[Turn]:
    """Returns the turns without the cases that an earlier run measured.

    The unpruned server is measured again for the remaining cases: ratios need servers measured in turns.
    """
    cases = dict.fromkeys(case for turn in part.turns for case in turn.cases)
    missing = {case for case in cases if not run.has(**known_case(plan, part.model, case))}
    workloads = {case.workload for case in missing}
    left = missing | {case for case in cases if case.is_unpruned and case.workload in workloads}
    turns = [replace(turn, cases=tuple(case for case in turn.cases if case in left)) for turn in part.turns]
    return [turn for turn in turns if turn.cases]


def _run_part(plan: ServePlan, part: _Part, generator: LoadGenerator, run: Run) -> None:
    if not part.turns:
        return
    generator.start()
    if part.model.model_path is None:
        run.step(f"{part.model.name}: writing the model")
        write_dummy_model(part.model.name, part.model_path)
    try:
        make = partial(side_server, plan, part.model, part.model_path, run.folder)
        with ServerPool(make, side_by_side=are_side_by_side(plan, part.model)) as pool:
            ModelRun(plan, part.model, part.model_path, pool, generator, run).measure(part.sides, part.turns)
    finally:
        # Chats contain their images, a gigabyte in a long sweep, and can be made again.
        shutil.rmtree(run.folder / "chats", ignore_errors=True)


def _print_commands(plan: ServePlan, parts: list[_Part], folder: Path) -> None:
    for part in parts:
        servers = {side: side_server(plan, part.model, part.model_path, folder, side) for side in part.sides}
        for side, server in servers.items():
            environment = [f"{name}={value}" for name, value in server.environment.items()]
            print(f"# {part.model.name}: server at budget {side.budget}, prefix cache {side.prefix_cache}")
            print(shlex.join(["env", *environment, *server.command] if environment else server.command))
        for turn in part.turns:
            for case in turn.cases:
                arguments, *_ = load_of(plan, turn, case, servers[turn.side], part.model_path, folder)
                print(f"# round {turn.round_idx}, {case.method} at budget {case.budget}")
                print(shlex.join(load_command(arguments)))
