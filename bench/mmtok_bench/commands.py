"""The command lines of `mmtok demo`, `bench` and `quality`; imports nothing slow."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

from mmtok_bench.arguments import (
    add_run_arguments,
    budget,
    count,
    each,
    image_size,
    mixed_budget,
    one_of,
    port,
    runs,
    seed,
    shape,
)
from mmtok_bench.families import FamilyName, PocketFamily
from mmtok_deploy.methods import IMAGE_METHODS

__all__ = ["add_bench_commands", "run_bench_command"]

_FAMILIES, _POCKET_FAMILIES = get_args(FamilyName), get_args(PocketFamily)


def add_bench_commands(commands: Any) -> None:
    """Adds the commands to the parser of `mmtok`."""
    _add_demo(commands)
    benches = commands.add_parser("bench", help="measure").add_subparsers(dest="bench", required=True, metavar="WHAT")
    _add_selector(benches)
    _add_serve(benches)
    _add_report(benches)
    _add_quality(commands)


def run_bench_command(arguments: argparse.Namespace) -> int:
    """Returns the exit code of the function that the command's parser names `run`.

    It is 0 if all went well, 1 if something failed, 2 for a wrong argument, 130 after Ctrl-C.
    """
    code: int = resolve_name(arguments.run)(arguments)
    return code


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="ask a small model about a picture, with and without a budget")
    demo.set_defaults(run="mmtok_bench.demo:run_demo")
    demo.add_argument(
        "--family", default="llava-1.5", choices=_POCKET_FAMILIES, help="family of the model (default llava-1.5)"
    )
    demo.add_argument(
        "--budget", default="25%", type=budget, help="vision tokens to keep: 64, 25%%, 0.25 (default 25%%)"
    )
    demo.add_argument(
        "--folder", default=Path("artifacts/demo"), type=Path, help="where to write (default artifacts/demo)"
    )
    page = demo.add_argument_group("in a browser")
    page.add_argument("--page", action="store_true", help="serve a page to choose picture, question, budget and method")
    page.add_argument("--url", help="a running server, such as http://127.0.0.1:30000; default: start the pocket model")
    page.add_argument(
        "--model-path", type=Path, metavar="FOLDER", help="the checkpoint that --url serves, to show its patches"
    )
    page.add_argument("--host", default="127.0.0.1", help="address of the page (default 127.0.0.1: this machine only)")
    page.add_argument("--port", default=8600, type=port, help="port of the page; 0 for any free port (default 8600)")


def _add_selector(benches: Any) -> None:
    selector = benches.add_parser("selector", help="time the selection by itself, and the published loop")
    selector.set_defaults(run="mmtok_bench.selector.bench:run_selector_bench")
    selector.add_argument(
        "--features",
        choices=("synthetic", "real"),
        default="synthetic",
        help="real: features of real images from trained encoders (pip install 'mmtok-deploy[features]'); picks are "
        "checked and compared, and nothing is timed (default synthetic)",
    )
    selector.add_argument("--images", type=count, default=40, help="images for each real encoder (default 40)")
    selector.add_argument("--shapes", type=each(shape), help="tokens x picks: 2880x160,576x16 (default: the paper's)")
    selector.add_argument("--batch", type=each(count), help="images in one call: 1,8,32 (default 1; all three on CUDA)")
    selector.add_argument("--backends", type=each(str), help="dense,torchscript,lazy,... (default: all)")
    selector.add_argument(
        "--authors",
        type=Path,
        metavar="FILE",
        help="also time the authors' own selector: mmtok/core/semantic_selector.py of their repository, which is run",
    )
    selector.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    selector.add_argument("--threads", type=count, help="PyTorch's threads on the CPU (default: its own number)")
    selector.add_argument("--runs", type=runs, default=15, help="timed runs of each backend, at least 2 (default 15)")
    add_run_arguments(selector, "artifacts/bench/selector")


def _add_serve(benches: Any) -> None:
    serve = benches.add_parser(
        "serve",
        help="measure latency, throughput and memory of a served model with and without budgets",
        description="Starts SGLang servers without the plugin and at every budget, and measures them with SGLang's own "
        "load generator. Options that are not given come from the preset.",
    )
    serve.set_defaults(run="mmtok_bench.serve.bench:run_serve_bench")
    serve.add_argument(
        "--preset", choices=("a6000", "h100", "h200", "cpu"), help="default: the one that fits this machine"
    )
    model = serve.add_mutually_exclusive_group()
    model.add_argument("--model-path", type=Path, metavar="FOLDER", help="measure this checkpoint; needs --family")
    model.add_argument(
        "--dummy-weights",
        action="store_true",
        help="the preset's models at full size with random weights, without any download (the default)",
    )
    serve.add_argument("--family", choices=_FAMILIES, help="family of the checkpoint at --model-path")
    serve.add_argument("--models", type=each(str), metavar="NAMES", help="only these models of the preset")
    serve.add_argument(
        "--budgets",
        type=each(mixed_budget),
        help="all,20%%,10%%,5%%,64; all is always among them. 10%%@0.5 is 10%% of a Qwen's image at half of each side, "
        "10%%~8 as many tokens, of those that differ by more than 8 of 255 from their neighbours",
    )
    serve.add_argument(
        "--methods", type=each(str), help="mmtok,divprune,dart: methods to measure; mmtok is always among them"
    )
    serve.add_argument("--concurrency", type=each(count), help="requests at a time: 1,4,16,64")
    serve.add_argument("--image-px", type=each(image_size), help="sizes of images, width x height: 1008x672,448x448")
    kinds = ("photograph", "document", "random")
    serve.add_argument("--image-kinds", type=each(one_of(*kinds)), help=",".join(kinds))
    serve.add_argument("--prefix-cache", type=each(one_of("off", "on")), help="off,on")
    serve.add_argument(
        "--questions-per-image",
        type=each(count),
        metavar="NUMBERS",
        help="questions about an image, one after another, as MME, POPE and chats ask them: 1,2,6",
    )
    serve.add_argument(
        "--images-in-turn", type=count, help="images that are asked about in turn (default: the concurrency)"
    )
    serve.add_argument("--num-requests", type=count, help="requests of each row and round, at least the concurrency")
    serve.add_argument("--output-tokens", type=count, help="length of every answer")
    serve.add_argument("--rounds", type=count, help="how often each row is measured, the servers in turns (default 5)")
    serve.add_argument(
        "--one-server",
        action="store_true",
        help="start one server with the plugin, and ask it for each budget by mm_processor_kwargs: for models of which "
        "two servers do not fit into the memory",
    )
    serve.add_argument(
        "--server-args",
        type=shlex.split,
        default=[],
        metavar="'ARGS'",
        help="further arguments of every server, as one word: --server-args='--attention-backend triton'",
    )
    add_run_arguments(serve, "artifacts/bench/serve")
    serve.add_argument("--dry-run", action="store_true", help="print every command instead of running it")


def _add_report(benches: Any) -> None:
    report = benches.add_parser("report", help="make a page with plots and tables of the results")
    report.set_defaults(run="mmtok_bench.report.command:run_report")
    report.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="files of rows, or folders of them")
    report.add_argument(
        "--output", type=Path, metavar="FILE.html", help="the page (default artifacts/bench/report.html)"
    )
    report.add_argument("--markdown", type=Path, metavar="FILE.md", help="the tables as Markdown; alone, no page")
    report.add_argument(
        "--panels", type=Path, metavar="FILE.html", help="the plots of quality side by side; alone, no page"
    )
    report.add_argument(
        "--compare", nargs=2, metavar=("OLD", "NEW"), help="compare the rows of two commits, the older one first"
    )
    report.add_argument("--force", action="store_true", help="replace existing files")


def _add_quality(commands: Any) -> None:
    quality = commands.add_parser(
        "quality",
        help="score a served model's answers by task, method and budget",
        description="Scores of a served model by task, method and budget: the pocket tasks, which need nothing but "
        "this package, or public benchmarks by lmms-eval, which `mmtok quality setup` installs.",
    )
    quality.set_defaults(run="mmtok_bench.quality.bench:run_quality")
    quality.add_argument("action", nargs="?", choices=("run", "setup"), default="run", help="default: run")
    what = quality.add_argument_group("questions")
    what.add_argument(
        "--tasks",
        type=each(str),
        default=["pocket"],
        help="pocket, or some of its kinds (existence,count,position,reading); pages, or some of its kinds (small-text,"
        "medium-text,large-text); or public ones: gqa,mmbench,mme,... (default pocket)",
    )
    what.add_argument(
        "--methods",
        type=each(str),
        help=f"some of {','.join(IMAGE_METHODS)} (default: all that the family can run); mmtok+agent: a second server, "
        "which adds the first server's unpruned answer to the guidance; mmtok+output: tokens are compared by the "
        "projector's output (--mmtok-keys), also possible for vision-coverage, scope and apet",
    )
    what.add_argument(
        "--budgets",
        type=each(str),
        help="default all,50%%,25%%,11%%,5%%,4; public tasks: the family's. 25%%@0.5 is 25%% of the tokens of a Qwen's "
        "image with half of each side, all@0.5 all of them, all~8 all tokens that differ by more than 8 of 255 from "
        "their neighbours",
    )
    what.add_argument("--seeds", type=each(seed), default=[0, 1, 2], help="seeds of the pocket scenes (default 0,1,2)")
    what.add_argument(
        "--num-questions",
        type=count,
        help="questions of each kind and seed (default 170), or of each public task (default: all)",
    )
    served = quality.add_argument_group("server")
    served.add_argument("--url", help="a running server, such as http://127.0.0.1:30000; default: start one")
    served.add_argument(
        "--family",
        choices=_FAMILIES,
        help="family of the model: decides the pocket model (default llava-1.5; for pages qwen2.5-vl) or the server "
        "arguments of --model-path, the methods, and for public tasks the paper's budgets",
    )
    served.add_argument("--model-path", help="model to start a server with (default: a pocket model)")
    served.add_argument(
        "--server-arg", action="append", default=[], metavar="ARG", help="an argument of the started server; repeatable"
    )
    served.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    served.add_argument("--concurrency", type=count, help="requests at a time (default 32; 8 for the families of Qwen)")
    served.add_argument("--max-tokens", type=count, help="tokens of a pocket answer (default: words of the right one)")
    lmms = quality.add_argument_group("public tasks")
    lmms.add_argument("--lmms-venv", type=Path, default=Path("artifacts/lmms-eval"), help="default artifacts/lmms-eval")
    lmms.add_argument("--include-path", type=Path, help="a folder of further lmms-eval task files")
    written = quality.add_argument_group("output")
    add_run_arguments(written, "artifacts/quality")
    written.add_argument("--record", action="store_true", help="write the scores that `make test` compares with")
    written.add_argument("--dry-run", action="store_true", help="print servers and questions instead of running them")
