"""mmtok quality."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from mmtok_bench.families import Family
from mmtok_deploy.methods import MethodName

__all__ = ["add_quality_parser", "run_quality"]

_KINDS = ("existence", "count", "position", "reading")
_INTERRUPTED = 130


def add_quality_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `mmtok quality`; imports nothing that is slow to import."""
    quality = commands.add_parser(
        "quality",
        help="does pruning hurt: scores of a served model by task, method and budget",
        description="Scores of a served model by task, method and budget: the pocket tasks, which need nothing but "
        "this package, or public benchmarks by lmms-eval, which `mmtok quality setup` installs.",
    )
    quality.add_argument("action", nargs="?", choices=("run", "setup"), default="run", help="default: run")
    what = quality.add_argument_group("what is asked")
    what.add_argument(
        "--tasks",
        type=_names,
        default=("pocket",),
        help=f"pocket, or some of its kinds ({', '.join(_KINDS)}); or public ones: gqa,mmbench,mme,pope,... "
        "(default pocket)",
    )
    what.add_argument(
        "--methods",
        type=_names,
        help=f"some of {','.join(get_args(MethodName))} (default: all that the family can run), or mmtok+agent: a "
        "second server, to whose guidance the first one's unpruned answer is added",
    )
    what.add_argument("--budgets", type=_names, help="default all,50%%,25%%,11%%,5%%,4; public tasks: the family's")
    what.add_argument("--seeds", type=_seeds, default=(0, 1, 2), help="of the pocket scenes (default 0,1,2)")
    what.add_argument(
        "--num-questions",
        type=_count,
        help="of each kind and seed (default 170), or of each public task (default: all of them)",
    )
    served = quality.add_argument_group("what is asked of")
    served.add_argument("--url", help="a running server, such as http://127.0.0.1:30000; default: start one")
    served.add_argument(
        "--family",
        choices=get_args(Family),
        help="of the model: which pocket model is served (default llava-1.5), or what the server of --model-path "
        "needs; which methods are run; for public tasks, the paper's budgets",
    )
    served.add_argument("--model-path", help="what the started server serves (default: a pocket model)")
    served.add_argument(
        "--server-arg", action="append", default=[], metavar="ARG", help="of the started server; once for each argument"
    )
    served.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    served.add_argument(
        "--concurrency", type=_count, help="requests under way at a time (default 32; 8 for the family qwen2.5-vl)"
    )
    served.add_argument(
        "--max-tokens", type=_count, help="of a pocket answer (default: as many words as the right one)"
    )
    lmms = quality.add_argument_group("public tasks")
    lmms.add_argument("--lmms-venv", type=Path, default=Path("artifacts/lmms-eval"), help="default artifacts/lmms-eval")
    lmms.add_argument("--include-path", type=Path, help="a folder of further lmms-eval task files")
    written = quality.add_argument_group("what is written")
    written.add_argument(
        "--results-dir",
        type=Path,
        default=Path("artifacts/quality"),
        help="for a new file of rows, the answers and the server's log (default artifacts/quality)",
    )
    written.add_argument("--resume", type=Path, metavar="FILE.jsonl", help="go on with an earlier run's file of rows")
    written.add_argument("--record", action="store_true", help="write what `make test` holds the pocket models to")
    written.add_argument("--json", action="store_true", help="print the rows, a JSON object a line")
    written.add_argument("--dry-run", action="store_true", help="print what would be started and asked, and stop")


def run_quality(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok quality`: 0, 1 where it failed, 2 for a wrong argument, 130 after Ctrl-C."""
    if arguments.concurrency is None:
        # On a CPU, SGLang's encoder of Qwen2.5-VL computes attention between all patches of all images of a batch.
        arguments.concurrency = 8 if arguments.family == "qwen2.5-vl" else 32
    try:
        if arguments.action == "setup":
            from mmtok_bench.quality.lmms_eval import install

            return install(arguments.lmms_venv)
        pocket = _pocket_kinds(arguments.tasks)
        if pocket:
            from mmtok_bench.quality.pocket import run_pocket_tasks

            return run_pocket_tasks(arguments, pocket)
        from mmtok_bench.quality.public import run_public_tasks

        return run_public_tasks(arguments)
    except ValueError as error:
        print(f"mmtok quality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Stopped; {_way_on(arguments)}", file=sys.stderr)
        return _INTERRUPTED


def _way_on(arguments: argparse.Namespace) -> str:
    if arguments.action == "setup":
        return "the same command installs what is missing."
    if _pocket_kinds(arguments.tasks):
        return "what was finished is kept, and --resume goes on from it."
    return "the rows of finished budgets are kept: name those that are left by --budgets."


def _pocket_kinds(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the kinds that the tasks name, or none where they are public.

    Raises:
        ValueError: Both in one run: they are not asked of the same models.
    """
    if tasks == ("pocket",):
        return _KINDS
    pocket = tuple(task for task in tasks if task in _KINDS)
    if (pocket and len(pocket) < len(tasks)) or "pocket" in tasks:
        raise ValueError(
            f"expected pocket, or kinds of it, or public tasks: got {', '.join(tasks)}; run them one by one"
        )
    return pocket


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"expected names with commas between, got {text!r}")
    return names


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between, got {text!r}") from None
