"""mmtok bench report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mmtok_bench.report.document import make_report
from mmtok_bench.report.gather import read_results
from mmtok_bench.report.markdown import to_markdown
from mmtok_bench.report.page import to_html

__all__ = ["run_report"]


def run_report(
    results: Sequence[Path],
    *,
    html: Path | None,
    markdown: Path | None,
    compared: tuple[str, str] | None = None,
    force: bool = False,
) -> int:
    """Returns the exit code of `mmtok bench report`: 0, or 2 where there is nothing to report or a file in the way.

    Args:
        results: Files of rows, or folders of them.
        html: Where to write the page; None writes none.
        markdown: Where to write the Markdown; None writes none.
        compared: Two commits to hold against each other, the older first.
        force: Replace files that are there.
    """
    outputs = [path for path in (html, markdown) if path is not None]
    try:
        for path in outputs:
            if path.exists() and not force:
                raise ValueError(f"{path} exists; --force replaces it")
        measurements, notes = read_results(results)
        report = make_report(measurements, notes, compared)
        for note in notes:
            print(f"mmtok bench report: {note}", file=sys.stderr)
        if html is not None:
            _write(html, to_html(report), force)
        if markdown is not None:
            _write(markdown, to_markdown(report), force)
    except (ValueError, OSError) as error:
        print(f"mmtok bench report: {error}", file=sys.stderr)
        return 2
    for path in outputs:
        print(f"Written: {path}")
    return 0


def _write(path: Path, text: str, force: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it first: whoever reads the old file never sees half of the new one.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    if force:
        partial.replace(path)
        return
    try:
        path.hardlink_to(partial)
    finally:
        partial.unlink()
