"""Runs `mmtok bench report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtok_bench.report.document import make_report, to_markdown
from mmtok_bench.report.frame import read_results
from mmtok_bench.report.page import to_html

__all__ = ["run_report"]


def run_report(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok bench report`: 0, or 2 if there are no rows or an output file exists."""
    markdown: Path | None = arguments.markdown
    page: Path | None = arguments.output
    if page is None and markdown is None:
        page = Path("artifacts/bench/report.html")
    outputs = [path for path in (page, markdown) if path is not None]
    try:
        for path in outputs:
            if path.exists() and not arguments.force:
                raise ValueError(f"{path} exists; --force replaces it")
        rows, notes = read_results(arguments.results)
        report = make_report(rows, notes, tuple(arguments.compare) if arguments.compare else None)
        for note in notes:
            print(f"mmtok bench report: {note}", file=sys.stderr)
        for path in outputs:
            _write(path, to_html(report) if path == page else to_markdown(report), arguments.force)
    except (ValueError, OSError) as error:
        print(f"mmtok bench report: {error}", file=sys.stderr)
        return 2
    for path in outputs:
        print(f"Written: {path}")
    return 0


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
