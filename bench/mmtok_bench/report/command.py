"""Runs `mmtok bench report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mmtok_bench.report.document import Report, make_report, to_markdown
from mmtok_bench.report.frame import read_results
from mmtok_bench.report.page import to_html
from mmtok_bench.report.panels import to_panels_html
from mmtok_bench.report.quality import OVER_TOKENS

__all__ = ["run_report"]


def run_report(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok bench report`: 0, or 2 if there are no rows or an output file exists."""
    markdown: Path | None = arguments.markdown
    page: Path | None = arguments.output
    side_by_side: Path | None = arguments.panels
    if page is None and markdown is None and side_by_side is None:
        page = Path("artifacts/bench/report.html")
    writers: dict[Path, Callable[[Report], str]] = {}
    for given, write in ((page, to_html), (markdown, to_markdown), (side_by_side, _panels_html)):
        if given is not None:
            writers[given] = write
    try:
        for path in writers:
            if path.exists() and not arguments.force:
                raise ValueError(f"{path} exists; --force replaces it")
        rows, notes = read_results(arguments.results)
        report = make_report(rows, notes, tuple(arguments.compare) if arguments.compare else None)
        for note in notes:
            print(f"mmtok bench report: {note}", file=sys.stderr)
        for path, text_of in writers.items():
            _write(path, text_of(report), arguments.force)
    except (ValueError, OSError) as error:
        print(f"mmtok bench report: {error}", file=sys.stderr)
        return 2
    for path in writers:
        print(f"Written: {path}")
    return 0


def _panels_html(report: Report) -> str:
    parts = [part for chapter in report.chapters for part in chapter.parts if part.title == "Quality"]
    plots = [plot for part in parts for plot in part.plots if plot.title.endswith(OVER_TOKENS)]
    return to_panels_html(plots)


def _write(path: Path, text: str, force: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written to a file beside it first, so that a reader never sees half of the new file.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    if force:
        partial.replace(path)
        return
    try:
        path.hardlink_to(partial)
    finally:
        partial.unlink()
