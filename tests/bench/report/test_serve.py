from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import pytest

from mmtok_bench.report.frame import frame_of
from mmtok_bench.report.serve import Line, bound_by, phases_ms, serve_lines, serve_part
from mmtok_bench.report.tables import Part, Table
from mmtok_bench.results import ResultRow
from tests.bench.report.rows import NEW, OLD, row, serve_case, serve_rows

TTFT = {"ttft_p50_ms": 100.0, "image_tokens_in": 864, "image_tokens_kept": 864}


def measured(rows: Sequence[ResultRow], file: str = "rows.jsonl") -> pd.DataFrame:
    return frame_of(rows, file)


def serve(budget: str, method: str, kept: float, commit: str = NEW, **changes: str | int) -> ResultRow:
    case = serve_case(budget, method, **changes)
    return row("serve", case, {**TTFT, "image_tokens_kept": kept, "ttft_p50_ms": kept}, commit=commit)


def headline(part: Part) -> Table:
    assert part.headline is not None
    return part.headline


PRUNED = serve("10%", "mmtok", 86)
UNPRUNED = serve("off", "none", 864)
SMALLER = serve("10%", "downsample", 90)


def first_line(*frames: pd.DataFrame) -> Line:
    """Returns the first row with what it is held against."""
    return serve_lines(pd.concat(frames, ignore_index=True))[0]


def test_names() -> None:
    lines = serve_lines(measured([UNPRUNED, PRUNED, SMALLER, serve("all", "none", 864)]))
    assert [line["label"] for line in lines] == ["unpruned", "MMTok 10%", "downsampled to 90", "MMTok all"]
    # Downsampling is done by a server without the plugin: whatever its budget is called, it is no reference.
    assert first_line(measured([serve("off", "downsample", 90)]))["variant"] == "downsample"


def test_references_are_of_the_same_run_and_case() -> None:
    pruned = measured([PRUNED])
    line = first_line(measured([PRUNED, UNPRUNED, SMALLER]))
    assert (line["vs_unpruned"]["metrics"], line["vs_downsampled"]["metrics"]) == (UNPRUNED.metrics, SMALLER.metrics)
    strangers = [
        measured([UNPRUNED, SMALLER], "other.jsonl"),
        measured([replace(each, commit=OLD) for each in (UNPRUNED, SMALLER)]),
        measured([replace(each, num_threads=1) for each in (UNPRUNED, SMALLER)]),
        measured([serve("off", "none", 864, concurrency=4), serve("10%", "downsample", 90, concurrency=4)]),
        measured([serve("off", "none", 864, prefix_cache="on"), serve("10%", "downsample", 90, image_kind="random")]),
    ]
    alone = first_line(pruned, *strangers)
    assert alone["vs_unpruned"] is alone["vs_downsampled"] is None


@pytest.mark.parametrize(("text_tokens", "is_like"), [(28, True), (33, True), (26, False), (34, False)])
def test_texts_are_counted_on_what_was_sent(text_tokens: int, is_like: bool) -> None:
    rows = measured([PRUNED, serve("off", "none", 864, text_tokens=text_tokens)])
    assert (first_line(rows)["vs_unpruned"] is not None) is is_like
    part = serve_part(rows)
    assert [trace.name for trace in part.plots[0].figure.data] == (["MMTok", "unpruned"] if is_like else ["MMTok"])


def test_a_metric_of_no_group_has_a_table() -> None:
    part = serve_part(measured([replace(PRUNED, metrics={**PRUNED.metrics, "num_fallbacks": 3})]))
    assert [table.title for table in part.tables] == [
        *("What a budget gains", "Latency", "Where the time goes, and memory", "Other figures")
    ]
    assert (part.tables[-1].columns[-1], part.tables[-1].rows[0][-1]) == ("num fallbacks", "3")


@pytest.mark.parametrize(("tokens", "is_equal"), [(78, True), (77, False), (94, True), (95, False)])
def test_equal_tokens_are_within_a_tenth(tokens: int, is_equal: bool) -> None:
    line = first_line(measured([PRUNED, serve("off", "downsample", tokens)]))
    assert (line["vs_downsampled"] is not None) is is_equal


def test_the_nearest_in_tokens_is_the_reference() -> None:
    line = first_line(measured([PRUNED, *(serve("off", "downsample", tokens) for tokens in (80, 87, 93))]))
    assert line["vs_downsampled"]["metrics"]["image_tokens_kept"] == 87


def test_the_headline_says_both_ratios() -> None:
    part = serve_part(measured([UNPRUNED, PRUNED, SMALLER]))
    table = headline(part)
    assert table.columns == (
        *("model", "budget", "at once", "TTFT vs unpruned", "TTFT vs downsampled", "TTFT p50, ms"),
        *("image tokens", "image, px"),
    )
    assert table.rows == (
        ("qwen2.5-vl-0.5b", "10%", "1", "10.05x faster", "1.05x faster", "864 → 86.0", "864 → 86", "1008x672"),
    )


def test_what_was_not_measured_is_said_and_has_no_column() -> None:
    part = serve_part(measured([UNPRUNED, PRUNED]))
    assert "TTFT vs downsampled" not in headline(part).columns
    said = " ".join(part.sentences)
    assert "Not measured in the same run: images downsampled to equal tokens." in said
    assert "the unpruned server" not in said
    assert "Not measured: TTFT p90, TTFT p99, inter-token p50" in said
    assert all("requests/s" not in column for table in part.tables for column in table.columns)
    assert [plot.title for plot in part.plots] == ["qwen2.5-vl-0.5b: time to first token against image tokens"]


def test_failed_requests_are_said() -> None:
    failed = replace(PRUNED, metrics={**PRUNED.metrics, "num_failed": 2})
    assert any("Requests failed in MMTok 10% at 1 at once" in each for each in serve_part(measured([failed])).sentences)


def test_other_keys_of_a_case_are_a_column_where_they_differ() -> None:
    part = serve_part(measured([PRUNED, serve("10%", "mmtok", 86, text_tokens=500)]))
    table = part.tables[0]
    assert [each[table.columns.index("text tokens")] for each in table.rows] == ["30", "500"]
    assert "output tokens" not in table.columns
    assert any("output tokens 16" in sentence for sentence in part.sentences)


def test_a_column_shows_the_flags_that_differ() -> None:
    flags = "--sleep-on-idle --dtype float16"
    more = f"--tokenizer-worker-num 4 {flags} --max-total-tokens=4"
    rows = [serve("10%", "mmtok", 86, server_arguments=each) for each in (flags, more)]
    part = serve_part(measured(rows))
    column = part.tables[0].columns.index("server arguments")
    assert [each[column] for each in part.tables[0].rows] == ["", "--tokenizer-worker-num 4 --max-total-tokens=4"]
    assert any(f"server arguments of all {flags}" in sentence for sentence in part.sentences)
    # Where none differs, there is no column.
    assert "server arguments" not in serve_part(measured(rows[:1])).tables[0].columns


def test_parts_that_exceed_the_whole_are_said() -> None:
    odd = replace(PRUNED, metrics={**PRUNED.metrics, "vision_encoder_ms": 500.0})
    part = serve_part(measured([odd, UNPRUNED]))
    said = "The TTFT is not split into parts, since their means exceed its median: MMTok 10% of 1008x672."
    assert said in part.sentences
    assert not any("where the time goes" in plot.title for plot in part.plots)


def test_unpruned_rows_alone_have_no_headline() -> None:
    assert serve_part(measured([UNPRUNED])).headline is None


def test_the_parts_of_a_first_token_add_up() -> None:
    metrics = {"ttft_p50_ms": 100.0, "vision_encoder_ms": 30.0, "selection_ms": 5.0, "language_prefill_ms": 50.0}
    (line,) = serve_lines(measured([row("serve", {}, metrics)]))
    parts = {"vision encoder": 30.0, "selection": 5.0, "language prefill": 50.0, "rest of TTFT": 15.0}
    assert phases_ms(line) == parts
    for others in ({**metrics, "ttft_p50_ms": 84.0}, {"ttft_p50_ms": 84.0}):
        (unknown,) = serve_lines(measured([row("serve", {}, others)]))
        assert phases_ms(unknown) == {}
        assert bound_by(unknown) == ""


def test_a_cell_says_which_stage_bounds_it() -> None:
    part = serve_part(measured(serve_rows()))
    (table,) = [each for each in part.tables if each.title == "Where the time goes, and memory"]
    place = table.columns.index("bound by")
    said = {(row[1], row[3], row[table.columns.index("at once")]): row[place] for row in table.rows}
    # 0.11 x 864 ms of the encoder, 20 + 0.9 x 864 of the language model, 20 + 0.9 x 86 with 10%; 12 and more beside.
    assert said["photograph 1008x672", "MMTok all", "1"].startswith("language prefill, ")
    assert said["photograph 1008x672", "MMTok 10%", "1"].startswith("language prefill, ")
    (plot,) = [each for each in part.plots if "where the time goes" in each.title]
    assert plot.figure.layout.yaxis.ticktext[0].startswith("unpruned<br><i>language prefill, ")
    slow_encoder = {"ttft_p50_ms": 100.0, "vision_encoder_ms": 60.0, "language_prefill_ms": 30.0}
    (line,) = serve_lines(measured([row("serve", {}, slow_encoder)]))
    assert bound_by(line) == "vision encoder, 60%"


def test_plots_of_every_metric() -> None:
    part = serve_part(measured(serve_rows()))
    traces = {plot.title.partition(": ")[2]: [trace.name for trace in plot.figure.data] for plot in part.plots}
    sizes = ("504x336", "1008x672")
    variants = ["unpruned", "MMTok all", "MMTok 20%", "downsampled to 174", "MMTok 10%", "downsampled to 88"]
    assert traces == {
        "time to first token against image tokens": [
            f"{name}, {px}" for px in sizes for name in ("MMTok", "downsampled", "unpruned")
        ],
        "throughput against concurrency": variants,
        "where the time goes": ["vision encoder", "selection", "language prefill", "rest of TTFT"],
        "peak memory": ["peak memory, GiB"],
        "KV tokens per request": ["KV tokens per request"],
        "requests that fit at once": ["requests that fit at once"],
    }
    first = part.plots[0]
    quiet = [each for each in serve_rows() if each.case["concurrency"] == 1]
    assert sum(len(trace.x) for trace in first.figure.data) == len(quiet) == len(first.values.rows)


def test_scales_and_methods_have_lines_of_their_own() -> None:
    rows = [
        serve("off", "none", 864),
        serve("10%", "mmtok", 86),
        serve("10%", "divprune", 86),
        serve("40%@0.5", "mmtok", 86),
        serve("20%", "downsample", 174),
        *(serve(f"{share}%", "mmtok", 9 * share) for share in range(11, 20)),
    ]
    rows = [replace(each, metrics={**each.metrics, "vision_encoder_ms": 4.0}) for each in rows]
    part = serve_part(measured(rows))
    assert {line[3] for line in part.tables[0].rows} >= {"MMTok 10%", "divprune 10%", "MMTok 40%@0.5"}
    first, *others = part.plots
    lines = {trace.name: (trace.line.color, trace.line.dash) for trace in first.figure.data}
    assert list(lines) == ["MMTok", "MMTok at scale 0.5", "divprune", "downsampled", "unpruned"]
    assert len(set(lines.values())) == len(lines)
    # Names of two lines beside each of many bars.
    (plot,) = [each for each in others if "where the time goes" in each.title]
    assert plot.figure.layout.height >= 40 * len(rows)


def test_tables_have_the_order_of_readers_not_of_turns() -> None:
    rows = [
        serve(budget, method, tokens, concurrency=concurrency)
        for concurrency, turns in (
            (4, [("5%", "mmtok", 43), ("10%", "mmtok", 86), ("off", "none", 864)]),
            (1, [("off", "none", 864), ("10%", "mmtok", 86), ("5%", "mmtok", 43)]),
        )
        for budget, method, tokens in turns
    ]
    part = serve_part(measured(rows))
    assert part.headline is not None
    assert [row[1:3] for row in part.headline.rows] == [("10%", "1"), ("5%", "1"), ("10%", "4"), ("5%", "4")]
    assert [row[3] for row in part.tables[0].rows[:3]] == ["unpruned", "MMTok 10%", "MMTok 5%"]


def test_where_a_budget_pays_is_said() -> None:
    part = serve_part(measured(serve_rows()))
    said = [sentence for sentence in part.sentences if "budget 10%: it paid everywhere measured" in sentence]
    assert len(said) == 1


def test_a_gain_of_several_rounds_stands_with_its_interval() -> None:
    gains = {"ttft_p50_gain": 2.0, "ttft_p50_gain_low": 1.85, "ttft_p50_gain_high": 2.149}
    of_rounds = replace(PRUNED, metrics={**PRUNED.metrics, **gains})
    (table,) = [table for table in serve_part(measured([UNPRUNED, of_rounds])).tables if "gains" in table.title]
    heading = "TTFT vs unpruned, 95% of rounds"
    assert [line[table.columns.index(heading)] for line in table.rows] == ["", "1.85 to 2.15x"]
    # Rows of one round, and those of before, have none.
    (table,) = [table for table in serve_part(measured([UNPRUNED, PRUNED])).tables if "gains" in table.title]
    assert not any("95%" in column for column in table.columns)


def test_loads_of_several_questions_are_held_against_their_like() -> None:
    rows = [serve("off", "none", 864, questions_per_image=6), serve("10%", "mmtok", 86, questions_per_image=6)]
    lines = serve_lines(measured([UNPRUNED, PRUNED, *rows]))
    assert lines[3]["vs_unpruned"]["case"]["questions_per_image"] == 6
    assert "questions_per_image" not in lines[1]["vs_unpruned"]["case"]
    table = next(table for table in serve_part(measured([UNPRUNED, PRUNED, *rows])).tables if "budget" in table.title)
    assert {line[table.columns.index("questions per image")] for line in table.rows} == {"", "6"}
