from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmtok_bench.results import append_row
from mmtok_deploy.cli import main
from tests.bench.report.rows import CPU, GPU, NEW, OLD, row, selector_rows, serve_rows, write


def report(*arguments: object) -> int:
    return main(["bench", "report", *map(str, arguments)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [*serve_rows(), *selector_rows()])


def test_the_markdown_leads_with_the_ratios(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown = rows.with_name("new") / "report.md"
    assert report(rows, "--markdown", markdown) == 0
    assert capsys.readouterr().out == f"Written: {markdown}\n"
    assert sorted(path.name for path in markdown.parent.iterdir()) == ["report.md"]
    text = markdown.read_text()
    assert text.index("| 10% | 1 |") < text.index("No row was measured on a GPU") < text.index("## Made-up CPU")
    assert "| qwen2.5-vl-0.5b | 10% | 1 | 4.30x faster | 1.74x slower | 2.48x higher | 1.22x lower |" in text
    assert "- Commit: bbbbbbb\n" in text


def test_what_no_row_measured_is_said(tmp_path: Path) -> None:
    for bench, rows, said in (
        ("selector", selector_rows(GPU), "Not measured here: a served model"),
        ("serve", serve_rows(GPU), "Not measured here: the selection by itself"),
    ):
        markdown = tmp_path / f"{bench}.md"
        assert report(write(tmp_path / f"{bench}.jsonl", rows), "--markdown", markdown) == 0
        text = markdown.read_text()
        assert said in text
        assert "on a GPU" not in text


def test_a_bench_without_a_section_of_its_own_is_a_table(tmp_path: Path) -> None:
    case = {"feature_cache_mb": 256, "question": 2}
    rows = write(tmp_path / "rows.jsonl", [row("second-question", case, {"latency_p50_ms": 12.5})])
    assert report(rows, "--markdown", tmp_path / "report.md") == 0
    text = (tmp_path / "report.md").read_text()
    assert "| backend | feature cache mb | question | latency p50, ms |\n| --- | --- | --- | ---: |\n" in text
    assert "| sglang | 256 | 2 | 12.5 |" in text


def test_a_pipe_in_a_name_is_no_column(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [row("other", {"name": "a|b"}, {})])
    assert report(rows, "--markdown", tmp_path / "report.md") == 0
    assert "| sglang | a\\|b |" in (tmp_path / "report.md").read_text()


def test_machines_share_the_headline(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [*selector_rows(CPU), *selector_rows(GPU, speed=8)])
    assert report(rows, "--markdown", tmp_path / "report.md") == 0
    text = (tmp_path / "report.md").read_text()
    assert "| machine | tokens → kept | fastest backend | p50, ms | against the published loop |" in text
    assert "| Made-up GPU | 2880 → 160 | lazy | 14.7 | 4.00x faster |" in text
    assert "| Made-up CPU, 2 cores, 2 threads | 2880 → 160 | lazy | 117 | 4.00x faster |" in text


def test_nothing_is_overwritten_without_force(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, markdown = rows.with_name("a.html"), rows.with_name("a.md")
    markdown.write_text("mine")
    assert report(rows, "--output", page, "--markdown", markdown) == 2
    assert capsys.readouterr().err == f"mmtok bench report: {markdown} exists; --force replaces it\n"
    assert markdown.read_text() == "mine"
    assert not page.exists()
    assert report(rows, "--output", page, "--markdown", markdown, "--force") == 0
    assert markdown.read_text().startswith("# ")
    assert page.read_text().startswith("<!doctype html>")
    assert len(list(rows.parent.iterdir())) == 3


def test_the_page_has_a_place_of_its_own(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(rows.parent)
    assert report(rows) == 0
    assert capsys.readouterr().out == "Written: artifacts/bench/report.html\n"
    assert Path("artifacts/bench/report.html").is_file()


def test_a_row_cut_off_is_told_here_and_in_the_report(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with rows.open("a") as file:
        file.write('{"bench')
    assert report(rows, "--markdown", rows.with_name("a.md")) == 0
    said = f"{rows}:{len(serve_rows() + selector_rows()) + 1} was cut off and is skipped"
    assert capsys.readouterr().err == f"mmtok bench report: {said}\n"
    assert said in rows.with_name("a.md").read_text()


def test_what_cannot_be_reported(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = rows.with_name("a.html")

    def message(*arguments: object) -> str:
        assert report(*arguments, "--output", page) == 2
        assert not page.exists()
        return capsys.readouterr().err

    assert "nowhere.jsonl does not exist" in message(rows.with_name("nowhere.jsonl"))
    assert "'ccc' names 0 commits" in message(rows, "--compare", "ccc", NEW)
    newer = rows.with_name("newer.jsonl")
    append_row(newer, replace(selector_rows()[0], schema=3))
    assert "newer.jsonl:1 is no result row: its schema is 3" in message(rows, newer)
    other = write(rows.with_name("other.jsonl"), [row("selector", {"num_tokens": 9}, {"latency_p50_ms": 1.0})])
    assert f"a row of selector has no 'num_picks' in {other}" in message(other)


def test_two_commits(tmp_path: Path) -> None:
    rows = [*selector_rows(commit=OLD), *selector_rows(commit=NEW, speed=2)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert report(path, "--markdown", tmp_path / "a.md", "--compare", OLD, NEW) == 0
    text = (tmp_path / "a.md").read_text()
    assert f"### {NEW} against {OLD}" in text
    assert text.count("| 2.00x faster |") == len(selector_rows())
