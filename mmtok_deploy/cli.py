"""The command line: mmtok."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import get_args

from mmtok_deploy import Budget, __version__

__all__ = ["main"]

_EXTRAS = {
    "bench": "bench",
    "demo": "bench,sglang",
    "quality": "bench,sglang",
    "export": "export",
    "pocket": "bench",
    "soak": "dev",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of one mmtok command: 0 ok, 1 a check failed, 2 usage, 130 Ctrl-C."""
    # Inside, so that every layer may start from here; light, so that --help is quick.

    from mmtok_bench.families import PocketFamily
    from mmtok_bench.quality.command import add_quality_parser
    from mmtok_bench.soak.command import add_soak_parser
    from mmtok_export.command import add_export_parser

    parser = argparse.ArgumentParser(prog="mmtok", description="MMTok vision-token selection, made deployable.")
    parser.add_argument("--version", action="version", version=f"mmtok-deploy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what is installed, what works here, and what to do about the rest")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    demo = commands.add_parser("demo", help="ask a small model about a picture, with and without a budget")
    demo.add_argument(
        "--family", default="llava-1.5", choices=get_args(PocketFamily), help="of the model (default llava-1.5)"
    )
    demo.add_argument(
        "--budget", default="25%", type=_budget, help="vision tokens to keep: 64, 25%%, 0.25 (default 25%%)"
    )
    demo.add_argument(
        "--folder", default=Path("artifacts/demo"), type=Path, help="where to write (default artifacts/demo)"
    )
    _add_bench(commands)
    add_quality_parser(commands)
    add_export_parser(commands)
    # Trains the pocket models: beside the packages in a checkout, and in no wheel.
    if importlib.util.find_spec("pocket_training") is not None:
        from pocket_training.command import add_pocket_parser

        add_pocket_parser(commands)
    add_soak_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        print(
            f"mmtok {arguments.command} needs {error.name}, which is not installed: "
            f"pip install 'mmtok-deploy[{_EXTRAS[arguments.command]}]'",
            file=sys.stderr,
        )
        return 1


def _run(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "doctor":
            from mmtok_deploy.doctor import run_doctor

            return run_doctor(json_output=arguments.json)
        case "bench":
            return _bench(arguments)
        case "quality":
            from mmtok_bench.quality.command import run_quality

            return run_quality(arguments)
        case "export":
            from mmtok_export.command import run_export

            return run_export(arguments)
        case "pocket":
            from pocket_training.command import run_pocket

            return run_pocket(arguments)
        case "soak":
            from mmtok_bench.soak.command import run_soak

            return run_soak(arguments)
        case _:
            from mmtok_bench.demo import run_demo

            return run_demo(family=arguments.family, budget=arguments.budget, folder=arguments.folder)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from mmtok_bench.serve.options import add_serve_parser

    bench = commands.add_parser("bench", help="measure").add_subparsers(dest="bench", required=True, metavar="WHAT")
    selector = bench.add_parser("selector", help="how long the selection takes, beside the published loop")
    selector.add_argument("--shapes", type=_shapes, help="tokens x picks: 2880x160,576x16 (default: the paper's six)")
    selector.add_argument("--batch", type=_counts, help="images in one call: 1,8,32 (default 1; those three on CUDA)")
    selector.add_argument("--backends", type=_names, default=[], help="dense,torchscript,lazy,... (default: all)")
    selector.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    selector.add_argument("--threads", type=_count, help="of PyTorch on the CPU (default: its own)")
    selector.add_argument("--runs", type=_runs, default=15, help="timed runs of each, at least 2 (default 15)")
    selector.add_argument("--json", action="store_true", help="print one JSON object a line instead of the table")
    selector.add_argument(
        "--output",
        default=Path("artifacts/bench/selector"),
        type=Path,
        help="folder for the rows and the plot (default artifacts/bench/selector); no older file is changed",
    )
    second = bench.add_parser("second-question", help="time to first token of a second question about an image")
    second.add_argument("--json", action="store_true", help="print one JSON object a line instead of the table")
    second.add_argument(
        "--output",
        default=Path("artifacts/bench/second-question"),
        type=Path,
        help="folder for the checkpoint, logs and rows (default artifacts/bench/second-question)",
    )
    _add_report(bench)
    add_serve_parser(bench)


def _add_report(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = bench.add_parser("report", help="one page of plots and tables of what was measured")
    report.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="files of rows, or folders of them")
    report.add_argument(
        "--output", type=Path, metavar="FILE.html", help="the page (default artifacts/bench/report.html)"
    )
    report.add_argument("--markdown", type=Path, metavar="FILE.md", help="the tables as Markdown; alone, no page")
    report.add_argument(
        "--compare", nargs=2, metavar=("OLD", "NEW"), help="hold a commit's rows against those of an older one"
    )
    report.add_argument("--force", action="store_true", help="replace files that are there")


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.bench == "selector":
        return _bench_selector(arguments)
    if arguments.bench == "report":
        return _bench_report(arguments)
    if arguments.bench == "serve":
        from mmtok_bench.serve.command import run_serve_bench

        return run_serve_bench(arguments)
    from mmtok_bench.second_question import run_second_question_bench

    return run_second_question_bench(folder=arguments.output, json_output=arguments.json)


def _bench_selector(arguments: argparse.Namespace) -> int:
    import torch

    from mmtok_bench.selector import DEFAULT_SHAPES, run_selector_bench

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return run_selector_bench(
            shapes=arguments.shapes or DEFAULT_SHAPES,
            batches=arguments.batch or ((1, 8, 32) if device == "cuda" else (1,)),
            backends=arguments.backends,
            device=device,
            num_threads=arguments.threads,
            num_runs=arguments.runs,
            folder=arguments.output,
            json_output=arguments.json,
        )
    except ValueError as error:
        print(f"mmtok bench selector: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Stopped; the rows of finished cases are kept in {arguments.output}.", file=sys.stderr)
        return 130


def _bench_report(arguments: argparse.Namespace) -> int:
    from mmtok_bench.report.command import run_report

    page = arguments.output
    if page is None and arguments.markdown is None:
        page = Path("artifacts/bench/report.html")
    return run_report(
        arguments.results,
        html=page,
        markdown=arguments.markdown,
        compared=tuple(arguments.compare) if arguments.compare else None,
        force=arguments.force,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _runs(text: str) -> int:
    if _count(text) < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2 runs, got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(each) for each in text.split(",")]


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for each in text.split(","):
        num_tokens, separator, num_picks = each.partition("x")
        if not separator or _count(num_picks) > _count(num_tokens):
            raise argparse.ArgumentTypeError(f"expected tokens x picks, such as 2880x160, no more picks: got {each!r}")
        shapes.append((int(num_tokens), int(num_picks)))
    return shapes


def _budget(text: str) -> str:
    try:
        Budget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
