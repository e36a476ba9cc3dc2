"""The demonstration: a photograph served without and with a budget, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openai
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from mmtok_deploy.bench.chat import Answer, ask, image_url
from mmtok_deploy.bench.photographs import photograph
from mmtok_deploy.bench.picture import draw_kept
from mmtok_deploy.bench.selected_patches import OneGridFamily, select_patches
from mmtok_deploy.bench.server import ServerError, SglangServer, cpu_arguments, cpu_environment, started
from mmtok_deploy.bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy.budget import Budget

__all__ = ["run_demo"]

_PHOTOGRAPH = "coffee"
_QUESTION = "What is on the table next to the cup?"
_TIMED_QUESTIONS = (
    "What colour is the saucer?",
    "Is the cup full or empty?",
    "Where does the spoon lie?",
    "What is the table made of?",
    "How many cups are there in the picture?",
)


@dataclass(frozen=True, slots=True)
class _Show:
    """One family's part: its name in print, and the arguments that its servers need."""

    family: OneGridFamily
    title: str
    arguments: tuple[str, ...]
    note: str | None = None


_SHOWS = (
    _Show("qwen2.5-vl", "Qwen2.5-VL", ()),
    _Show(
        "llava-1.5",
        "LLaVA-1.5",
        # SGLang 0.5.23's own LLaVA-1.5 does not load (models/llava.py, line 788).
        ("--model-impl=transformers",),
        "SGLang serves LLaVA-1.5 by its Transformers backend, for which it turns the prefix cache off; with a budget, "
        "the plugin leaves it on.",
    ),
)


@dataclass(frozen=True, slots=True)
class _Measured:
    first: Answer
    again: Answer
    ttft_ms: float


def run_demo(*, budget: str = "10%", folder: Path = Path("artifacts/demo")) -> int:
    """Returns the exit code of `mmtok demo`: 0, 1 if a server failed, or 130 after Ctrl-C. No server outlives it.

    Args:
        budget: What `--mmtok-budget` is given.
        folder: Where checkpoints, logs and pictures go.

    Raises:
        ValueError: A budget that is not understood.
    """
    Budget.parse(budget)
    # The bars of a checkpoint of 3 MB say nothing.
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False)
    console.print(
        "[bold]A photograph, asked about without and with a budget[/bold]\n\n"
        "Real SGLang servers and real architectures on the CPU, but tiny checkpoints with [bold]random weights[/bold]: "
        "the answers are noise. Look at the tokens that the language model reads. The times are real too, but say "
        "little about a real model: this language model is so small that reading a token costs next to nothing.\n"
    )
    written = []
    try:
        for show in _SHOWS:
            written += _run_show(show, budget, folder, console)
    except (ServerError, openai.OpenAIError, OSError) as error:
        console.print(f"[bold red]The demonstration failed:[/bold red] {type(error).__name__}")
        console.print(str(error), markup=False)
        console.print(f"The servers' logs are in {folder / 'logs'}.")
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; the servers have ended.")
        return 130
    console.print("Written:")
    for path in written:
        console.print(f"  {path}", markup=False, soft_wrap=True)
    return 0


def _run_show(show: _Show, budget: str, folder: Path, console: Console) -> list[Path]:
    checkpoint = make_tiny_checkpoint(show.family, folder / "checkpoints" / show.family)
    image = photograph(_PHOTOGRAPH)
    console.print(f"[bold]{show.title}[/bold]: starting two servers, without and with --mmtok-budget {budget}")
    with console.status("both are starting") as status:
        logs = [folder / "logs" / f"{show.family}-{name}.log" for name in ("without-budget", "with-budget")]
        servers = [
            SglangServer(
                checkpoint,
                *cpu_arguments(),
                "--enable-cache-report",
                *show.arguments,
                *arguments,
                env=cpu_environment(),
                log_path=log,
                on_progress=lambda waited_s, _: status.update(f"both are starting, {waited_s:.0f} s"),
            )
            for log, arguments in zip(logs, ((), (f"--mmtok-budget={budget}",)), strict=True)
        ]
        # Side by side: for half of a start, one server has one core's worth of work.
        with started(*servers):
            picture = _draw(show, checkpoint, image, budget, folder / f"{show.family}.png")
            for server in servers:
                server.wait_until_ready()
            status.update("asking")
            without, with_budget = _measure(servers, image)
            status.update("stopping both")
    console.print(_table(without, with_budget, budget))
    if show.note is not None:
        console.print(f"[dim]{show.note}[/dim]")
    starts = " and ".join(f"{server.start_s:.0f}" for server in servers)
    console.print(f"[dim]The servers were ready after {starts} s.[/dim]\n")
    return [picture, *logs]


def _measure(servers: list[SglangServer], image: Image.Image) -> list[_Measured]:
    """Returns what each server answered; they take turns, so that a busy machine slows both."""
    clients = [server.client() for server in servers]
    # Questions are timed about images that no cache has seen; the first one is not, it makes a server set itself up.
    ttfts_ms: list[list[float]] = [[] for _ in clients]
    for number, question in enumerate((_QUESTION, *_TIMED_QUESTIONS)):
        url = image_url(_with_corner(image, number))
        for client, times_ms in zip(clients, ttfts_ms, strict=True):
            times_ms.append(ask(client, url, question, max_tokens=1).ttft_ms)
    url = image_url(image)
    return [
        _Measured(
            ask(client, url, _QUESTION), ask(client, url, _QUESTION, max_tokens=1), statistics.median(times_ms[1:])
        )
        for client, times_ms in zip(clients, ttfts_ms, strict=True)
    ]


def _with_corner(image: Image.Image, shade: int) -> Image.Image:
    copy = image.copy()
    copy.putpixel((0, 0), (shade, shade, shade))
    return copy


def _table(without: _Measured, with_budget: _Measured, budget: str) -> Table:
    table = Table(title=f"“{_QUESTION}”", title_justify="left", title_style="italic")
    table.add_column("")
    table.add_column("without a budget", justify="right")
    table.add_column(f"--mmtok-budget {budget}", justify="right", style="bold")
    rows: dict[str, Callable[[_Measured], str]] = {
        "image tokens": lambda measured: f"{measured.first.num_image_tokens}",
        "prompt tokens": lambda measured: f"{measured.first.num_prompt_tokens}",
        f"time to first token, median of {len(_TIMED_QUESTIONS)}": lambda measured: f"{measured.ttft_ms:.0f} ms",
        "cached tokens when asked again": lambda measured: f"{measured.again.num_cached_tokens}",
    }
    for name, value in rows.items():
        table.add_row(name, value(without), value(with_budget))
    # Text: noise may look like markup.
    table.add_row("the answer's start (noise)", Text(without.first.text), Text(with_budget.first.text))
    return table


def _draw(show: _Show, checkpoint: Path, image: Image.Image, budget: str, path: Path) -> Path:
    selected = select_patches(show.family, checkpoint, image, _QUESTION, budget)
    return draw_kept(
        selected.image,
        selected.grid,
        selected.selection.order.tolist(),
        path,
        title=f"{show.title}, budget {budget}: “{_QUESTION}”",
    )
