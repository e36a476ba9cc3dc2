"""The page in a real browser: Chromium, without a screen and without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from mmtok_bench.report.document import Report, make_report
from mmtok_bench.report.frame import read_results
from mmtok_deploy.cli import main
from tests.bench.report.rows import GPU, NEW, OLD, selector_rows, serve_rows, write

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000"),
)
HOSTILE = '</script><b class="injected">x'

pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="no chromium and chromedriver here: apt-get install chromium chromium-driver",
)


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
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
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
    opened[0].execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    opened[0].execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def ask(browser: webdriver.Chrome, script: str) -> Any:
    return browser.execute_script(f"return {script}")


def narrow_to(browser: webdriver.Chrome, width_px: int) -> None:
    metrics = {"width": width_px, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


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
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
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
        # The ratio that WCAG 2.2 asks of text.
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector


def luminance(colour: str) -> float:
    """Returns the relative luminance of "rgb(r, g, b)"; source: WCAG 2.2."""
    channels = [int(each) / 255 for each in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
