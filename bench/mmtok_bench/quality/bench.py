"""Runs `mmtok quality` on the pocket tasks, and on public benchmarks by `public`."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from mmtok_bench.client import openai_client
from mmtok_bench.families import FAMILY_TRAITS, FamilyName, family_arguments
from mmtok_bench.pocket import PAGE_READER, PICTURE_PX, pocket_checkpoint
from mmtok_bench.pocket.questions import KINDS, PAGE_KINDS, Kind, check_kinds
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.quality import lmms_eval, public
from mmtok_bench.quality.plan import METHODS_INSIDE, WITH_AGENT, QualityPlan, answers_beside
from mmtok_bench.quality.recorded import RECORDED, RECORDED_BUDGET, RECORDED_METHOD, record
from mmtok_bench.quality.rows import BENCH
from mmtok_bench.quality.sweep import Sweep
from mmtok_bench.run import Run, run_command
from mmtok_bench.server import ServerError, SglangServer, cpu_arguments, make_server, server_info, started
from mmtok_bench.server_metrics import read_counts
from mmtok_deploy.methods import IMAGE_METHODS

__all__ = ["quality_server", "run_quality"]

_DEFAULT_FAMILY: FamilyName = "llava-1.5"
# Names of all kinds of questions together.
_ALL_KINDS: Mapping[str, tuple[Kind, ...]] = {"pocket": KINDS, "pages": PAGE_KINDS}
# With many running requests, the agent may take this long. A question that it does not answer ends the run.
_AGENT_TIMEOUT_MS = 60_000
_SIZES = {"max_total_tokens": 65536, "max_running_requests": 64}
# Each request chooses method and budget. The log has no line for each of tens of thousands of requests.
_SERVED = ("--mmtok-budget=all", "--enable-cache-report", "--log-level-http=warning")


def run_quality(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok quality`: 0, 1 if it failed, 2 for a wrong argument, 130 after Ctrl-C."""
    if arguments.concurrency is None:
        # On a CPU, SGLang's encoder of a Qwen computes attention between all patches of all images of a batch.
        is_qwen = FAMILY_TRAITS[_family(arguments, _kinds(arguments.tasks))].token_px is not None
        arguments.concurrency = 8 if is_qwen else 32
    command = partial(run_command, "mmtok quality")
    if arguments.action == "setup":
        return command(
            lambda: lmms_eval.install(arguments.lmms_venv), stopped="the same command installs what is missing."
        )
    if {*KINDS, *PAGE_KINDS} & set(_kinds(arguments.tasks)):
        kept = "what was finished is kept, and --resume goes on from it."
        return command(lambda: run_pocket_tasks(arguments), stopped=kept)
    kept = "the rows of finished budgets are kept, and --resume goes on from them."
    return command(lambda: public.run_public_tasks(arguments), stopped=kept)


def run_pocket_tasks(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok quality` on the pocket tasks.

    Raises:
        ValueError: The arguments make no plan, or the file of --resume belongs to another plan.
        MeasurementError: The server or a request failed; finished settings are kept.
    """
    plan = _plan(arguments)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.dry_run:
        _print_plan(plan, arguments, device)
        return 0
    run = Run(BENCH, arguments.results_dir, resume=arguments.resume, json_output=arguments.json)
    family = _family(arguments, plan.kinds)
    sweep = Sweep(plan, run, _model_name(arguments, plan), device=device, picture_px=PICTURE_PX.get(family, SCENE_PX))
    for note in sweep.prepare():
        print(f"mmtok quality: {note}", file=sys.stderr)
    try:
        with _served(arguments, plan, device, run) as (url, guided):
            server_info(url, prunes=True)
            with run.steps(plan.num_requests, sweep.num_done):
                sweep.ask_all(
                    openai_client(url),
                    num_at_once=arguments.concurrency,
                    max_tokens=arguments.max_tokens,
                    agent_client=None if guided is None else openai_client(guided.url),
                    # After each setting: the counts of an earlier run's server are not known after --resume.
                    check_agent=lambda: _check_agent(guided),
                )
            if guided is not None:
                run.console.print(_cost_of_agent(guided))
    except Exception:
        print(f"What was finished is in {run.path}; --resume goes on from it.", file=sys.stderr)
        raise
    rows = sweep.rows()
    run.show(rows)
    run.console.print(f"Written: {answers_beside(run.path)}", markup=False, soft_wrap=True)
    if arguments.record:
        record(rows, family, RECORDED)
        run.console.print(f"Written: {RECORDED}", markup=False, soft_wrap=True)
    return 0


def quality_server(
    model_path: str | Path,
    family: FamilyName | None,
    device: torch.device,
    *arguments: str,
    log_path: Path | None = None,
) -> SglangServer:
    """Returns a server, not yet started, whose requests each choose method and budget."""
    on_cpu = device.type == "cpu"
    # A model this small gains nothing from a second thread, and the tokenizer's process has the other core.
    env = {"OMP_NUM_THREADS": "1"} if on_cpu else {}
    return make_server(model_path, family, *_SERVED, *arguments, on_cpu=on_cpu, env=env, log_path=log_path, **_SIZES)


def _plan(arguments: argparse.Namespace) -> QualityPlan:
    default = QualityPlan()
    kinds = _kinds(arguments.tasks)
    if not set(kinds) <= {*KINDS, *PAGE_KINDS}:
        raise ValueError(
            f"expected pocket, pages, or kinds of one of them, or public tasks: got {', '.join(arguments.tasks)}; run "
            "them one by one"
        )
    check_kinds(kinds)
    family = _family(arguments, kinds)
    impossible = FAMILY_TRAITS[family].impossible_methods
    possible = [name for name in IMAGE_METHODS if name not in impossible]
    plan = QualityPlan(
        methods=tuple(arguments.methods or possible),
        budgets=tuple(arguments.budgets or default.budgets),
        seeds=tuple(arguments.seeds),
        kinds=tuple(kind for kind in (*KINDS, *PAGE_KINDS) if kind in kinds),
        num_questions=arguments.num_questions or default.num_questions,
    )
    if arguments.family or not (arguments.url or arguments.model_path):
        plan.check_family(family)
    if arguments.record and plan.is_about_pages:
        raise ValueError("--record is for scenes: drop it, or ask with --tasks pocket")
    if arguments.record and (arguments.url or arguments.model_path):
        raise ValueError("--record is for the pocket models of this package: drop it, or --url and --model-path")
    if arguments.record and ((RECORDED_METHOD, RECORDED_BUDGET) not in plan.pairs() or len(plan.seeds) < 2):
        raise ValueError(
            f"--record writes {RECORDED_METHOD} at {RECORDED_BUDGET} over several seeds: have them among --methods, "
            "--budgets and --seeds, or drop it"
        )
    if inside := [method for method in plan.methods if method in METHODS_INSIDE]:
        raise ValueError(
            f"{inside[0]} leaves tokens out inside the language model, which no server does: mmtok pocket answers"
        )
    if arguments.url and WITH_AGENT in plan.methods:
        raise ValueError(f"{WITH_AGENT} needs two servers, which are started without --url: drop one of the two")
    return plan


def _kinds(tasks: Sequence[str]) -> list[str]:
    """Returns the kinds of questions, and the public tasks, that `--tasks` names."""
    return [kind for task in tasks for kind in _ALL_KINDS.get(task, (task,))]


def _family(arguments: argparse.Namespace, kinds: Sequence[str]) -> FamilyName:
    """Returns the given family, or else that of the pocket model that answers questions of these kinds."""
    default: FamilyName = PAGE_READER if kinds[0] in PAGE_KINDS else _DEFAULT_FAMILY
    return arguments.family or default


def _model_name(arguments: argparse.Namespace, plan: QualityPlan) -> str:
    """Returns the model's name in rows, and after it the server arguments that were given."""
    if arguments.url:
        return str(server_info(arguments.url).get("model_path", arguments.url))
    checkpoint, _ = _chosen(arguments, plan)
    is_pocket = Path(checkpoint).resolve().parent == pocket_checkpoint(_DEFAULT_FAMILY).parent
    return " ".join([f"pocket {Path(checkpoint).name}" if is_pocket else str(checkpoint), *arguments.server_arg])


def _chosen(arguments: argparse.Namespace, plan: QualityPlan) -> tuple[str | Path, FamilyName | None]:
    """Returns the checkpoint to serve, and its family."""
    if arguments.model_path is not None:
        return arguments.model_path, arguments.family
    family = _family(arguments, plan.kinds)
    return pocket_checkpoint(family, reads_pages=plan.is_about_pages), family


def _print_plan(plan: QualityPlan, arguments: argparse.Namespace, device: torch.device) -> None:
    if arguments.url:
        print(f"a running server at {arguments.url}")
    else:
        model_path, family = _chosen(arguments, plan)
        small = cpu_arguments(**_SIZES) if device.type == "cpu" else []
        given = [*small, *_SERVED, *family_arguments(family), *arguments.server_arg]
        command = ["python", "-m", "sglang.launch_server", f"--model-path={model_path}", *given]
        print(shlex.join(command))
        if WITH_AGENT in plan.methods:
            print(shlex.join([*command, *_agent_arguments("http://127.0.0.1:PORT_OF_THE_FIRST/v1")]))
    for method, budget in plan.pairs():
        print(f"{method} at {budget}: {', '.join(plan.kinds)}, {plan.num_questions} each, seeds {plan.seeds}")
    print(f"{plan.num_requests} requests, {arguments.concurrency} at a time")


@contextlib.contextmanager
def _served(
    arguments: argparse.Namespace, plan: QualityPlan, device: torch.device, run: Run
) -> Iterator[tuple[str, SglangServer | None]]:
    """Yields the server's address, and the second server if the plan has the method `WITH_AGENT`.

    The second server asks the first one, which prunes nothing unless a request says so: the model is its own agent.
    """
    if arguments.url:
        yield arguments.url, None
        return
    make = partial(quality_server, *_chosen(arguments, plan), device, *arguments.server_arg)
    servers = [make(log_path=run.path.with_suffix(".log"))]
    if WITH_AGENT in plan.methods:
        with_agent = _agent_arguments(f"{servers[0].url}/v1")
        servers.append(make(*with_agent, log_path=run.path.with_suffix(".agent.log")))
    with started(*servers):
        with run.console.status("starting the server" if len(servers) == 1 else "starting two servers"):
            for server in servers:
                server.wait_until_ready()
        yield servers[0].url, servers[1] if len(servers) > 1 else None


def _agent_arguments(url: str) -> list[str]:
    return [f"--mmtok-agent-url={url}", f"--mmtok-agent-timeout-ms={_AGENT_TIMEOUT_MS}", "--enable-metrics"]


def _check_agent(server: SglangServer | None) -> None:
    """Checks that the agent answered every question so far.

    Raises:
        ServerError: It did not: the scores would be those of unguided requests, too.
    """
    counts = read_counts(server) if server is not None else {}
    num_missed = sum(counts.get(f"mmtok:agent_{name}_total", 0) for name in ("timeouts", "errors", "skips"))
    if num_missed:
        num_asked = counts.get("mmtok:agent_milliseconds_count", 0)
        raise ServerError(f"{num_missed:.0f} of {num_asked:.0f} questions had no answer of the agent: see its log")


def _cost_of_agent(server: SglangServer) -> str:
    counts = read_counts(server)
    num_asked = counts.get("mmtok:agent_milliseconds_count", 0)
    mean_ms = counts.get("mmtok:agent_milliseconds_sum", 0) / max(1, num_asked)
    return f"The agent was asked {num_asked:.0f} times; a request waited {mean_ms:.1f} ms for it, on average."
