"""The page in a real browser: Chromium, without a screen and without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from mmtok_bench.report.document import Report, make_report
from mmtok_bench.report.frame import read_results
from mmtok_bench.report.metrics import sort_key
from mmtok_deploy.cli import main
from tests.bench.browser import (
    LEAST_CONTRAST,
    as_before,
    ask,
    contrast,
    luminance,
    narrow_to,
    needs_browser,
    open_browser,
    prefer,
)
from tests.bench.report.rows import GPU, NEW, OLD, selector_rows, serve_rows, write

HOSTILE = '</script><b class="injected">x'

pytestmark = needs_browser


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rows")
    renamed = [replace(each, case={**each.case, "model": HOSTILE}) for each in serve_rows(GPU, speed=9)]
    return [
        write(folder / "cpu.jsonl", [*serve_rows(), *selector_rows(commit=OLD)]),
        write(folder / "gpu.jsonl", [*renamed, *selector_rows(speed=2)]),
    ]


@pytest.fixture(scope="module")
def expected(files: list[Path]) -> Report:
    return make_report(*read_results(files), (OLD, NEW))


@pytest.fixture(scope="module")
def opened(files: list[Path]) -> Iterator[tuple[webdriver.Chrome, list[str], list[str]]]:
    """Returns the browser with the page open, what its console said, and what it asked for."""
    page = files[0].with_name("report.html")
    assert main(["bench", "report", *map(str, files), f"--output={page}", "--compare", OLD, NEW]) == 0
    browser = open_browser()
    try:
        browser.get(page.as_uri())
        console = [str(entry) for entry in browser.get_log("browser")]
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
        assert asked[:1] == [page.as_uri()]
        yield browser, console, asked[1:]
    finally:
        browser.quit()


@pytest.fixture
def browser(opened: tuple[webdriver.Chrome, list[str], list[str]]) -> Iterator[webdriver.Chrome]:
    yield opened[0]
    as_before(opened[0])


def test_no_errors_and_nothing_fetched(opened: tuple[webdriver.Chrome, list[str], list[str]]) -> None:
    _, console, asked = opened
    assert console == []
    assert asked == []


def test_a_fetch_would_be_refused(browser: webdriver.Chrome) -> None:
    script = "const done = arguments[0]; fetch('file:///').then(() => done('fetched'), (error) => done(error.name))"
    assert browser.execute_async_script(script) == "TypeError"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_every_plot_is_drawn(browser: webdriver.Chrome, expected: Report) -> None:
    plots = [plot for chapter in expected.chapters for part in chapter.parts for plot in part.plots]
    # From two machines six plots each of a served model, and of one of them two of the selector.
    assert len(plots) == 14
    drawn = ask(
        browser,
        """[...document.querySelectorAll("figure")].map((figure) => ({
            title: figure.querySelector("figcaption strong").textContent,
            label: figure.querySelector("[role=img]").getAttribute("aria-label"),
            lines: figure.querySelectorAll(".scatterlayer .trace").length,
            points: figure.querySelectorAll(".scatterlayer .point").length,
            bars: figure.querySelectorAll(".barlayer .point path").length,
            box: figure.querySelector(".nsewdrag").getBoundingClientRect().toJSON(),
        }))""",
    )
    for plot, seen in zip(plots, drawn, strict=True):
        scatters = [trace for trace in plot.figure.data if trace.type == "scatter"]
        bars = [trace for trace in plot.figure.data if trace.type == "bar"]
        assert seen["title"] == plot.title
        assert plot.note in seen["label"]
        assert seen["lines"] == len(scatters)
        assert seen["points"] == sum(len(trace.x) for trace in scatters)
        assert seen["bars"] == sum(len(trace.x) for trace in bars)
        assert seen["points"] + seen["bars"] > 0
        assert seen["box"]["width"] > 150
        assert seen["box"]["height"] > 100


def test_bars_are_as_long_as_their_values(browser: webdriver.Chrome) -> None:
    widths = ask(
        browser,
        """[...[...document.querySelectorAll("figure")].find((figure) => figure.textContent.includes("KV tokens"))
            .querySelectorAll(".barlayer .point path")].map((path) => path.getBoundingClientRect().width)""",
    )
    # Unpruned, all, 20%, 10%, downsampled to as many as 20% and 10%; 46 tokens of text each.
    tokens = [864 + 46, 864 + 46, 172 + 46, 86 + 46, 174 + 46, 88 + 46]
    assert [width / widths[0] for width in widths] == pytest.approx([each / tokens[0] for each in tokens], abs=0.02)


def test_every_table_says_what_the_rows_say(browser: webdriver.Chrome, expected: Report) -> None:
    seen = ask(
        browser,
        """[...document.querySelectorAll("table")].map((table) => ({
            title: table.caption.textContent,
            columns: [...table.tHead.rows[0].cells].map((cell) => cell.textContent),
            rows: [...table.tBodies[0].rows].filter((row) => row.querySelector("td"))
                .map((row) => [...row.cells].map((cell) => cell.textContent)),
        }))""",
    )
    tables = list(expected.headlines)
    for chapter in expected.chapters:
        for part in chapter.parts:
            tables += [*(plot.values for plot in part.plots), *part.tables]
    for table, shown in zip(tables, seen, strict=True):
        first = 1 if table.is_grouped else 0
        assert shown["title"] == table.title
        assert tuple(shown["columns"]) == table.columns[first:]
        assert [tuple(cells) for cells in shown["rows"]] == [row[first:] for row in table.rows]
    unpruned, tenth = (
        next(each for each in serve_rows() if each.case["budget"] == budget and each.case["method"] == method)
        for budget, method in (("off", "none"), ("10%", "mmtok"))
    )
    unpruned_ms, pruned_ms = (each.metrics["ttft_p50_ms"] for each in (unpruned, tenth))
    lines = [dict(zip(seen[0]["columns"], cells, strict=True)) for cells in seen[0]["rows"]]
    (line,) = [
        each for each in lines if (each["model"], each["budget"], each["at once"]) == ("qwen2.5-vl-0.5b", "10%", "1")
    ]
    assert line["TTFT vs unpruned"] == f"{unpruned_ms / pruned_ms:.2f}x faster"
    assert line["TTFT p50, ms"] == f"{unpruned_ms:.0f} → {pruned_ms:.0f}"


def cells(browser: webdriver.Chrome, column: str) -> list[list[str]]:
    """Returns a column of the first table, machine by machine."""
    return ask(  # type: ignore[no-any-return]
        browser,
        f"""[...document.querySelector("table").tBodies[0].rows].reduce((groups, row) => {{
            const headings = [...row.closest("table").tHead.rows[0].cells].map((each) => each.textContent);
            const place = headings.indexOf("{column}");
            if (row.querySelector("th")) groups.push([]); else groups.at(-1).push(row.cells[place].textContent);
            return groups;
        }}, [])""",
    )


def test_tables_sort_within_their_groups(browser: webdriver.Chrome) -> None:
    def press(column: str) -> str | None:
        script = (
            "[...document.querySelectorAll('table:first-of-type thead button')].find((each) => each.textContent === "
        )
        browser.execute_script(f"{script}'{column}').click()")
        sorted_by: str | None = ask(browser, "document.querySelector('[aria-sort]')?.ariaSort")
        return sorted_by

    before = cells(browser, "TTFT vs unpruned")
    assert len(before) == 2
    assert press("TTFT vs unpruned") == "descending"
    falling = cells(browser, "TTFT vs unpruned")
    keys = [[sort_key(cell) or 0 for cell in group] for group in falling]
    assert keys == [sorted(group, reverse=True) for group in keys]
    assert [sorted(group) for group in falling] == [sorted(group) for group in before]
    assert press("TTFT vs unpruned") == "ascending"
    assert cells(browser, "TTFT vs unpruned") == [sorted(group, key=sort_key) for group in before]  # type: ignore[arg-type]
    # Words come first to last, and numbers in them by their size: 5% before 10%.
    assert press("budget") == "ascending"
    assert cells(browser, "budget")[0] == sorted(cells(browser, "budget")[0], key=lambda cell: int(cell.rstrip("%")))


def test_two_machines_stand_beside_each_other(browser: webdriver.Chrome) -> None:
    places = """[...document.querySelectorAll(".machine")].map((chapter) =>
        [...chapter.querySelectorAll("h2, .part")].map((each) => each.getBoundingClientRect().toJSON()))"""
    choose = """[...document.querySelectorAll(".beside select")].forEach((each, idx) => {
        each.value = arguments[idx]; each.dispatchEvent(new Event("change")); })"""
    browser.execute_script(choose, "0", "1")
    gpu, cpu = ask(browser, places)
    # Headings, and what both measured, begin in the same line.
    for one, other in zip(gpu, cpu, strict=False):
        assert one["top"] == other["top"]
        assert one["right"] <= other["left"]
    shown = "[...document.querySelectorAll('.chapter')].map((each) => each.checkVisibility())"
    assert ask(browser, shown) == [True, True, False]
    browser.execute_script(choose, "", "")
    gpu, cpu = ask(browser, places)
    assert gpu[-1]["bottom"] <= cpu[0]["top"]
    assert ask(browser, shown) == [True, True, True]


def test_names_are_text_whatever_they_hold(browser: webdriver.Chrome) -> None:
    assert ask(browser, "document.querySelectorAll('.injected').length") == 0
    assert HOSTILE in ask(browser, "document.querySelector('.headline').textContent")


@pytest.mark.parametrize("width_px", [360, 390])
def test_a_phone_scrolls_tables_and_not_the_page(browser: webdriver.Chrome, width_px: int) -> None:
    narrow_to(browser, width_px)
    widest = "Math.max(...[...document.querySelectorAll('.main-svg')].map((svg) => svg.getBoundingClientRect().right))"
    # Plots follow the width a moment later.
    WebDriverWait(browser, 10).until(lambda _: ask(browser, f"innerWidth === {width_px} && {widest} <= {width_px}"))
    assert ask(browser, "document.documentElement.scrollWidth") == width_px
    assert ask(browser, "document.querySelector('.headline .scroll').scrollWidth") > width_px


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: webdriver.Chrome, scheme: str) -> None:
    prefer(browser, scheme)
    paper = luminance(ask(browser, "getComputedStyle(document.querySelector('figure')).backgroundColor"))
    assert (paper < 0.1) is (scheme == "dark")
    for selector, style in (
        ("figure .xtick text", "fill"),
        ("figure .legendtext", "fill"),
        ("figcaption span", "color"),
        ("td", "color"),
        ("td.gain", "color"),
        ("td.loss", "color"),
    ):
        ink = luminance(ask(browser, f"getComputedStyle(document.querySelector('{selector}')).{style}"))
        assert contrast(ink, paper) >= LEAST_CONTRAST, selector
