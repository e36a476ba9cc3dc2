"""The command line of `mmtok pocket`: trains pocket models and calibrates the budget auto."""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any, get_args

from mmtok_bench.arguments import count, each, seed
from mmtok_bench.families import PocketFamily
from pocket_training import TrainedFamily

__all__ = ["add_pocket_parser", "run_pocket"]

_USAGE, _INTERRUPTED = 2, 130
# Where there is no progress bar, as in a log file.
_STEPS_A_LINE = 100


def add_pocket_parser(commands: Any) -> None:
    """Adds `mmtok pocket` and its subcommands to the command line's parser."""
    pocket = commands.add_parser("pocket", help="train a pocket model, draw its scenes, calibrate the budget auto")
    pocket.set_defaults(run="pocket_training.command:run_pocket")
    kinds = pocket.add_subparsers(dest="pocket", required=True, metavar="WHAT")
    train = kinds.add_parser("train", help="train a model from scratch; continues an earlier run")
    about = "default llava-1.5, with --pages or --sizes qwen2.5-vl; llava-next goes on from llava-1.5"
    train.add_argument("--family", choices=get_args(TrainedFamily), help=about)
    train.add_argument(
        "--folder", type=Path, help="folder of the state and the checkpoint (default artifacts/pocket/FAMILY)"
    )
    more = train.add_mutually_exclusive_group()
    for further, learns in (("pages", "read pages"), ("sizes", "see images of three sizes")):
        about = f"go on from the pocket Qwen2.5-VL of this package, and learn to {learns}"
        more.add_argument(f"--{further}", dest="further", action="store_const", const=further, help=about)
    train.add_argument("--seed", type=int, default=0, help="seed of the weights and of all scenes (default 0)")
    train.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    train.add_argument("--threads", type=int, help="PyTorch's threads on the CPU (default: its own number)")
    scenes = kinds.add_parser("scenes", help="draw eight scenes with a question each, as one picture")
    scenes.add_argument("--pages", action="store_true", help="draw pages")
    scenes.add_argument("--seed", type=int, default=0, help="seed of the scenes (default 0)")
    scenes.add_argument(
        "--output", type=Path, default=Path("artifacts/pocket/scenes.png"), help="default artifacts/pocket/scenes.png"
    )

    shares = kinds.add_parser("shares", help="compute the shares of the budget auto from rows of mmtok quality")
    shares.add_argument("rows", type=Path, nargs="+", metavar="FILE.jsonl", help="rows of all models")
    answers = kinds.add_parser("answers", help="ask a pocket model in this process, without a server")
    about = "default llava-1.5, with --pages qwen2.5-vl"
    answers.add_argument("--family", choices=get_args(PocketFamily), help=about)
    answers.add_argument("--budgets", type=each(str), required=True, help="auto,32,25%%; all is asked once")
    answers.add_argument(
        "--methods", type=each(str), default=["mmtok"], help="as in mmtok quality: mmtok,mmtok+output (default mmtok)"
    )
    about = "ask the model that reads pages about them"
    answers.add_argument("--pages", dest="further", action="store_const", const="pages", help=about)
    answers.add_argument("--seeds", type=each(seed), default=[3, 4, 5], help="seeds of the scenes (default 3,4,5)")
    answers.add_argument("--num-questions", type=count, default=170, help="questions of a kind and seed (default 170)")
    answers.add_argument(
        "--rows", type=Path, metavar="FILE.jsonl", help="append the scores to this file, as mmtok quality writes them"
    )
    answers.add_argument("output", type=Path, metavar="FILE.answers", help="file to append the answers to")
    auto = kinds.add_parser("auto", help="compare the budget auto with others, and features of images with answers")
    auto.add_argument("answers", type=Path, metavar="FILE.answers", help="answers of a model, some at the budget auto")


def run_pocket(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok pocket`: 0, 1 for a file with wrong contents, 2 usage, 130 after Ctrl-C."""
    if arguments.pocket in ("train", "answers"):
        from mmtok_bench.pocket import PAGE_READER

        arguments.family = arguments.family or (PAGE_READER if arguments.further else "llava-1.5")
    if arguments.pocket == "scenes":
        from pocket_training.questions import draw_sheet

        print(draw_sheet(arguments.output, seed=arguments.seed, pages=arguments.pages))
        return 0
    try:
        if arguments.pocket == "answers":
            return _answer(arguments)
        return _train(arguments) if arguments.pocket == "train" else _calibrate(arguments)
    except (OSError, ValueError) as error:
        print(f"mmtok pocket {arguments.pocket}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = ""
        if arguments.pocket == "train":
            kept = f"; the same command continues from the last state in {_folder(arguments)}"
        elif arguments.pocket == "answers":
            kept = f"; answers to the questions of finished seeds are in {arguments.output}, ask the others by --seeds"
        print(f"Stopped{kept}.", file=sys.stderr)
        return _INTERRUPTED


def _answer(arguments: argparse.Namespace) -> int:
    from mmtok_bench.pocket.questions import KINDS, PAGE_KINDS
    from mmtok_bench.quality.plan import QualityPlan
    from pocket_training.pruned_answers import answer_all, check_plan, write_rows

    try:
        plan = QualityPlan(
            *(tuple(arguments.methods), tuple(arguments.budgets), tuple(arguments.seeds)),
            kinds=PAGE_KINDS if arguments.further else KINDS,
            num_questions=arguments.num_questions,
        )
        check_plan(arguments.family, plan)
    except ValueError as error:
        print(f"mmtok pocket answers: {error}", file=sys.stderr)
        return _USAGE
    answer_all(arguments.family, plan, arguments.output)
    if arguments.rows is not None:
        write_rows(arguments.family, plan, arguments.output, arguments.rows)
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from mmtok_bench.results import read_rows
    from mmtok_deploy.budget import Budget
    from pocket_training.auto_budget import lines_of_comparison, shares_of

    if arguments.pocket == "auto":
        print("\n".join(lines_of_comparison(arguments.answers)))
        return 0
    for asked, share in shares_of([row for path in arguments.rows for row in read_rows(path)]).items():
        print(f"{asked:8}{Budget(ratio=share)}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from mmtok_bench.pocket import pocket_checkpoint
    from mmtok_bench.run import progress_bar, quiet_transformers
    from pocket_training.training import STAGES_ON_PAGES, STAGES_ON_SIZES, Stage, Training

    _keep_freed_memory()
    quiet_transformers()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    more: dict[str, Any] = {"start": pocket_checkpoint("llava-1.5")} if arguments.family == "llava-next" else {}
    if arguments.further == "pages":
        # Raises for a family of which no model reads pages.
        pocket_checkpoint(arguments.family, reads_pages=True)
        more = {"stages": STAGES_ON_PAGES, "start": pocket_checkpoint(arguments.family)}
    if arguments.further == "sizes":
        if arguments.family != "qwen2.5-vl":
            raise ValueError(f"the pocket {arguments.family} sees images of one size, only qwen2.5-vl of several")
        more = {"stages": STAGES_ON_SIZES, "start": pocket_checkpoint(arguments.family)}
    training = Training(_folder(arguments), arguments.family, arguments.seed, device, **more)
    console = Console(highlight=False)
    with progress_bar(console, "{task.fields[figures]}") as progress:
        bar = progress.add_task("", total=training.num_steps, completed=training.num_steps_done, figures="")

        def show(step: int, stage: Stage, figures: dict[str, float]) -> None:
            shown = "  ".join(f"{name} {figure:.2f}" for name, figure in figures.items())
            progress.update(bar, completed=step, description=stage.task, figures=shown)
            if not console.is_terminal and (step % _STEPS_A_LINE == 0 or step == training.num_steps):
                console.print(f"step {step} of {training.num_steps}, {stage.task}: {shown}", soft_wrap=True)

        training.run(show)
    print(training.save_checkpoint())
    return 0


def _folder(arguments: argparse.Namespace) -> Path:
    folder: Path | None = arguments.folder
    return folder or Path("artifacts/pocket") / "-".join(filter(None, (arguments.family, arguments.further)))


def _keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next step: half of a step went into page faults on a virtual machine."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
