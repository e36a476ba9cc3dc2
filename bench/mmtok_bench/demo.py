"""`mmtok demo`: serves the pocket model without and with a budget, and asks both servers about one scene."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from mmtok_bench.client import Answer, ask, image_url
from mmtok_bench.families import PocketFamily
from mmtok_bench.picture import draw_kept
from mmtok_bench.pocket import PICTURE_PX, pocket_checkpoint
from mmtok_bench.pocket.questions import AskedScene, Question, make_scenes, picture_of, render
from mmtok_bench.quality.scoring import is_right, normalise
from mmtok_bench.run import quiet_transformers, run_command
from mmtok_bench.selected_patches import PatchSelector
from mmtok_bench.server import SglangServer, make_server, started

__all__ = ["run_demo"]

# A scene that the model was not trained on: six things, a digit and a letter.
_SCENE_SEED = 107
_NUM_QUESTIONS = 8
_SHOWN_KINDS = ("position", "reading")
_PICTURE_SCALE = 8
_MODELS: Mapping[PocketFamily, str] = {
    "llava-1.5": "a LLaVA-1.5 of 2.8 million parameters",
    "qwen2.5-vl": "a Qwen2.5-VL of 2.1 million parameters",
}


@dataclass(frozen=True, slots=True)
class _Measured:
    """One server's results: an answer to each question, another answer to the first one, and the median TTFT."""

    answers: list[Answer]
    again: Answer
    ttft_ms: float


def run_demo(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok demo`: 0, 1 if a server failed, or 130 after Ctrl-C. All servers are stopped."""
    return run_command("mmtok demo", lambda: _chosen(arguments))


def _chosen(arguments: argparse.Namespace) -> int:
    if arguments.page:
        from mmtok_bench.page.command import serve_page

        return serve_page(arguments)
    if arguments.url or arguments.model_path:
        raise ValueError("--url and --model-path are for the page: add --page")
    return _run(arguments.family, arguments.budget, arguments.folder)


def _run(family: PocketFamily, budget: str, folder: Path) -> int:
    quiet_transformers()
    console = Console(highlight=False)
    console.print(
        "[bold]A picture, asked about without and with a budget[/bold]\n\n"
        f"Two real SGLang servers, and a pocket model: {_MODELS[family]}, which this project trained from scratch on "
        "scenes like this one. docs/quality.md has its scores on thousands of them. "
        "Its language model is so small that pruning saves hardly any time: compare the tokens, not the times.\n"
    )
    asked = make_scenes(_SCENE_SEED, _NUM_QUESTIONS)[0]
    image = picture_of(asked.scene, PICTURE_PX[family])
    logs = [folder / "logs" / f"{name}.log" for name in ("without-budget", "with-budget")]
    with console.status("starting two servers") as status:
        servers = [
            make_server(
                pocket_checkpoint(family),
                family,
                "--enable-cache-report",
                *arguments,
                log_path=log,
                on_progress=lambda waited_s, _: status.update(f"starting two servers, {waited_s:.0f} s"),
            )
            for log, arguments in zip(logs, ((), (f"--mmtok-budget={budget}",)), strict=True)
        ]
        # Both start at once: for half of its start, a server keeps only one core busy.
        with started(*servers):
            pictures = list(_draw_pictures(family, asked, image, budget, folder))
            for server in servers:
                server.wait_until_ready()
            status.update("asking")
            without, with_budget = _measure(servers, image, asked.questions)
            status.update("stopping both")
    console.print(_answer_table(asked.questions, without, with_budget, budget))
    console.print(_token_table(without, with_budget, budget))
    if family == "llava-1.5":
        console.print(
            "[dim]SGLang serves LLaVA-1.5 by its Transformers backend, for which it turns the prefix cache off; with a "
            "budget, the plugin leaves it on.[/dim]"
        )
    starts = " and ".join(f"{server.start_s:.0f}" for server in servers)
    console.print(f"[dim]The servers were ready after {starts} s.[/dim]\n")
    console.print("Written:")
    for path in (*pictures, *logs):
        console.print(f"  {path}", markup=False, soft_wrap=True)
    return 0


def _measure(
    servers: Sequence[SglangServer], image: Image.Image, questions: Sequence[Question]
) -> tuple[_Measured, ...]:
    """Returns each server's results; the servers take turns, so that other programs slow both equally."""
    clients = [server.client() for server in servers]
    # Each timed question has an image that no cache has seen. The first is a warm-up and is not timed.
    ttfts_ms: list[list[float]] = [[] for _ in clients]
    for number, question in enumerate(questions):
        changed = image.copy()
        changed.putpixel((0, 0), (number, number, number))
        url = image_url(changed)
        for client, times_ms in zip(clients, ttfts_ms, strict=True):
            times_ms.append(ask(client, url, question.text, max_tokens=1).ttft_ms)
    url = image_url(image)
    return tuple(
        _Measured(
            [
                # As many tokens as the right answer has words, as in `mmtok quality`.
                ask(client, url, question.text, max_tokens=len(question.answer.split()), ignore_eos=False)
                for question in questions
            ],
            ask(client, url, questions[0].text, max_tokens=1),
            statistics.median(times_ms[1:]),
        )
        for client, times_ms in zip(clients, ttfts_ms, strict=True)
    )


def _answer_table(questions: Sequence[Question], without: _Measured, with_budget: _Measured, budget: str) -> Table:
    table = Table("question", "right answer", "without a budget", f"--mmtok-budget {budget}")
    for question, *answers in zip(questions, without.answers, with_budget.answers, strict=True):
        shown = [
            f"{normalise(answer.text)}{'' if is_right(question, answer.text) else '  [red](wrong)[/red]'}"
            for answer in answers
        ]
        table.add_row(question.text, normalise(question.answer), *shown)
    return table


def _token_table(without: _Measured, with_budget: _Measured, budget: str) -> Table:
    table = Table("")
    table.add_column("without a budget", justify="right")
    table.add_column(f"--mmtok-budget {budget}", justify="right")
    both = (without, with_budget)
    firsts = [measured.answers[0] for measured in both]
    table.add_row("image tokens", *(str(first.num_image_tokens) for first in firsts))
    table.add_row("prompt tokens of the first question", *(str(first.num_prompt_tokens) for first in firsts))
    table.add_row("cached tokens when it is asked again", *(str(each.again.num_cached_tokens) for each in both))
    timed = f"time to first token, median of {len(without.answers) - 1}"
    table.add_row(timed, *(f"{each.ttft_ms:.0f} ms" for each in both))
    return table


def _draw_pictures(
    family: PocketFamily, asked: AskedScene, image: Image.Image, budget: str, folder: Path
) -> Iterator[Path]:
    """Yields the paths of pictures of the enlarged scene that show the patches that a question keeps."""
    selector = PatchSelector(family, pocket_checkpoint(family))
    encoded, shown = selector.encode(image), render(asked.scene, _PICTURE_SCALE)
    for kind in _SHOWN_KINDS:
        text = next(question.text for question in asked.questions if question.kind == kind)
        order = selector.select(encoded, selector.embed(text), budget).order.tolist()
        yield draw_kept(shown, encoded.grid, order, folder / f"kept-{kind}.png", title=f"budget {budget}: “{text}”")
