from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from mmtok_bench.report.document import make_report, to_markdown
from mmtok_bench.report.frame import frame_of
from mmtok_bench.report.panels import panels
from mmtok_bench.report.quality import quality_part
from mmtok_bench.results import CaseValue, ResultRow
from mmtok_deploy.cli import main
from mmtok_deploy.methods import MethodName
from tests.bench.report.rows import row, write


def scored(method: str, budget: str, kept: float, accuracy: float, **changes: CaseValue) -> ResultRow:
    case: dict[str, CaseValue] = {"task": "pocket", "kind": "count", "method": method, "budget": budget}
    case |= {"model": "pocket llava-1.5", "seed": "all", "question_set": "abc", **changes}
    metrics = {"num_questions": 510.0, "accuracy": accuracy, "chance": 0.2, "majority": 0.25, "tokens_kept": kept}
    metrics |= {"accuracy_low": accuracy - 0.04, "accuracy_high": accuracy + 0.03}
    if method != "unpruned":
        metrics |= {"share": accuracy / 0.8, "share_low": accuracy / 0.8 - 0.05, "share_high": accuracy / 0.8 + 0.05}
    return row("quality", case, metrics)


ROWS = [
    scored("unpruned", "all", 196, 0.8),
    scored("mmtok", "25%", 49, 0.72),
    scored("even", "25%", 49, 0.6),
    scored("mmtok", "4", 4, 0.4),
    scored("even", "4", 4, 0.32),
]


def test_a_line_for_each_method_against_tokens_kept() -> None:
    (plot,) = quality_part(frame_of(ROWS)).plots
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in plot.figure.data}
    assert lines == {
        "mmtok": ([4, 49], [0.4, 0.72]),
        "even": ([4, 49], [0.32, 0.6]),
        "unpruned": ([4, 196], [0.8, 0.8]),
    }
    assert plot.figure.data[0].error_y.array == pytest.approx((0.03, 0.03))
    assert plot.figure.data[0].error_y.arrayminus == pytest.approx((0.04, 0.04))


def test_by_how_much_keys_of_the_output_are_ahead() -> None:
    ahead = scored("mmtok+output", "25%", 49, 0.75)
    ahead = replace(ahead, metrics={**ahead.metrics, "gain": 0.03, "gain_low": -0.001, "gain_high": 0.06})
    text = to_markdown(make_report(frame_of([*ROWS, ahead])))
    assert "75.0 (71.0 to 78.0), 94% of unpruned (89 to 99), +3.0 against input keys (-0.1 to +6.0)" in text


def test_panels_of_all_kinds_have_one_legend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = get_args(MethodName)
    rows = [
        scored(method, budget, kept, 0.1 + kept / 100, kind=kind)
        for kind in ("existence", "count")
        for method in methods
        for budget, kept in (("25%", 49), ("4", 4))
    ]
    plots = quality_part(frame_of(rows)).plots
    figure = panels(plots)
    assert [each.text for each in figure.layout.annotations] == ["existence", "count"]
    assert [trace.name for trace in figure.data] == [*methods, *methods]
    assert [trace.name for trace in figure.data if trace.showlegend] == list(methods)
    # No two methods look alike.
    assert len({(trace.line.color, trace.line.dash) for trace in figure.data}) == len(methods)
    assert figure.layout.xaxis.tickvals == (4, 49)
    path = write(tmp_path / "rows.jsonl", rows)
    assert main(["bench", "report", str(path), f"--panels={tmp_path}/panels.html"]) == 0
    assert "plotly" in (tmp_path / "panels.html").read_text()
    empty = write(tmp_path / "few.jsonl", [scored("mmtok", "4", 4, 0.4)])
    assert main(["bench", "report", str(empty), f"--panels={tmp_path}/few.html"]) == 2
    assert "no scores at several budgets" in capsys.readouterr().err


def mixed(budget: str, kept: float, accuracy: float, kind: str = "count") -> ResultRow:
    return scored("unpruned" if budget.startswith("all") else "mmtok", budget, kept, accuracy, kind=kind)


MIXED = [
    *(mixed(*each) for each in (("all", 196, 0.8), ("25%", 49, 0.7), ("5%", 9, 0.3))),
    *(mixed(*each) for each in (("all@0.5", 49, 0.74), ("25%@0.5", 12, 0.4), ("11%@0.5", 5, 0.5))),
    # At a scale of which no image was kept whole, what is encoded is not known.
    mixed("25%@0.7", 25, 0.9),
]


def test_the_frontier_of_budgets_and_scales() -> None:
    rows = [*MIXED, *(mixed(str(row.case["budget"]), row.metrics["tokens_kept"], 0.5, "position") for row in MIXED)]
    plot, *by_kind = quality_part(frame_of(rows)).plots
    lines: dict[str, Any] = {trace.name: (list(trace.x), pytest.approx(list(trace.y))) for trace in plot.figure.data}
    assert lines == {
        "frontier": ([54, 98, 392], [0.5, 0.62, 0.65]),
        "encoder scale 1": ([205, 245, 392], [0.4, 0.6, 0.65]),
        "encoder scale 0.5": ([54, 61, 98], [0.5, 0.45, 0.62]),
    }
    # The plots of methods are of whole images.
    assert [list(trace.x) for trace in by_kind[0].figure.data] == [[9, 49], [9, 196]]
    # A kind that was not asked at a budget leaves it out.
    (plot, *_) = quality_part(frame_of(rows[:-2])).plots
    assert [list(trace.x) for trace in plot.figure.data][2] == [61, 98]


def served(budget: str, ttft_ms: float, **case: Any) -> ResultRow:
    whole: dict[str, CaseValue] = {
        **{"model": "qwen2.5-vl-3b", "image_px": "392x392", "budget": budget, "concurrency": 1, "prefix_cache": "off"},
        **{"method": "none" if budget in ("off", "all") else "mmtok", "questions_per_image": 1, "weights": "dummy"},
        **{"family": "qwen2.5-vl", "image_kind": "photograph", "output_tokens": 1, "preset": "cpu"},
    }
    return row("serve", {**whole, **case}, {"ttft_p50_ms": ttft_ms, "image_tokens_in": 196})


def test_the_frontier_over_the_times_of_a_served_model() -> None:
    times = [
        *(served(*each) for each in (("off", 2100.0), ("all", 2000.0), ("25%", 1300.0), ("5%", 1200.0))),
        *(served(*each) for each in (("all@0.5", 500.0), ("25%@0.5", 400.0), ("11%@0.5", 390.0))),
        # Other loads, and images of another size.
        *(
            served("25%", 9.0, **case)
            for case in ({"concurrency": 4}, {"prefix_cache": "on"}, {"method": "downsample"})
        ),
        replace(served("all", 8.0, image_px="56x56"), metrics={"ttft_p50_ms": 8.0, "image_tokens_in": 4}),
    ]
    over_time, over_tokens, *_ = quality_part(frame_of(MIXED), frame_of(times)).plots
    assert over_time.title == "Quality and time: pocket llava-1.5, with the times of qwen2.5-vl-3b, images of 392x392"
    lines: dict[str, Any] = {
        trace.name: (list(trace.x), pytest.approx(list(trace.y))) for trace in over_time.figure.data
    }
    assert lines == {
        "frontier": ([390, 500, 2000], [0.5, 0.74, 0.8]),
        "encoder scale 1": ([1200, 1300, 2000], [0.3, 0.7, 0.8]),
        "encoder scale 0.5": ([390, 400, 500], [0.5, 0.4, 0.74]),
    }
    assert over_tokens.figure.layout.xaxis.title.text == "image tokens, encoded + kept"
    # No size of image has as many tokens.
    (first, *_) = quality_part(frame_of(MIXED), frame_of(times[-1:])).plots
    assert first.title == over_tokens.title


def test_methods_down_budgets_across() -> None:
    (table,) = quality_part(frame_of(ROWS)).tables
    assert table.title == (
        "pocket llava-1.5: count: accuracy, % (95% interval), 510 questions; chance 20, always the commonest answer 25"
    )
    assert table.columns == ("method", "all (196 tokens)", "25% (49 tokens)", "4 tokens")
    assert table.rows == (
        ("unpruned", "80.0 (76.0 to 83.0)", "", ""),
        (
            "mmtok",
            "",
            "72.0 (68.0 to 75.0), 90% of unpruned (85 to 95)",
            "40.0 (36.0 to 43.0), 50% of unpruned (45 to 55)",
        ),
        (
            "even",
            "",
            "60.0 (56.0 to 63.0), 75% of unpruned (70 to 80)",
            "32.0 (28.0 to 35.0), 40% of unpruned (35 to 45)",
        ),
    )


def test_single_seeds_give_way_to_all_of_them() -> None:
    one = scored("mmtok", "25%", 49, 0.1, seed="0")
    assert quality_part(frame_of([one, *ROWS])).tables == quality_part(frame_of(ROWS)).tables
    (table,) = quality_part(frame_of([one])).tables
    assert table.rows[0][1].startswith("10.0")


def test_models_are_apart() -> None:
    others = [
        scored(*given, model="pocket qwen2.5-vl") for given in (("mmtok", "25%", 49, 0.5), ("mmtok", "4", 4, 0.3))
    ]
    part = quality_part(frame_of([*ROWS, *others]))
    assert [table.title.split(":")[0] for table in part.tables] == ["pocket llava-1.5", "pocket qwen2.5-vl"]
    assert [plot.title.split(",")[0] for plot in part.plots] == [
        "Quality: pocket llava-1.5",
        "Quality: pocket qwen2.5-vl",
    ]


def fewer(row: ResultRow, **changes: CaseValue) -> ResultRow:
    return replace(row, case={**row.case, **changes}, metrics={**row.metrics, "num_questions": 10.0, "accuracy": 0.1})


def test_a_table_is_of_one_set_of_questions() -> None:
    later = [replace(fewer(each, question_set="few"), time="2026-11-22T10:00:00+00:00") for each in ROWS[:2]]
    part = quality_part(frame_of([*ROWS, *later]))
    assert part.tables == quality_part(frame_of(ROWS)).tables
    assert part.sentences[1].endswith("; left out are 2 rows of pocket llava-1.5 over 10 questions.")
    assert quality_part(frame_of(later)).sentences[1:] == ()


def test_of_sets_as_large_the_newest_counts() -> None:
    other = replace(scored("mmtok", "25%", 49, 0.9, question_set="new"), time="2026-11-22T10:00:00+00:00")
    for rows in ([*ROWS, other], [other, *ROWS]):
        (table,) = quality_part(frame_of(rows)).tables
        assert [line[0] for line in table.rows] == ["mmtok"]
        assert table.rows[0][1].startswith("90.0")


def test_a_model_of_one_seed_stands_beside_one_of_several() -> None:
    single = [scored(*given, model="one", seed="0", question_set="s0") for given in (("mmtok", "4", 4, 0.5),)]
    part = quality_part(frame_of([*ROWS, *single]))
    assert [table.title.split(":")[0] for table in part.tables] == ["pocket llava-1.5", "one"]
    assert part.sentences[1:] == ()


def test_single_seeds_of_what_is_not_shown_are_told() -> None:
    seeds = [scored(method, "4", 4, 0.3, seed="0", question_set="s0") for method in ("mmtok", "divprune")]
    part = quality_part(frame_of([*ROWS, *seeds]))
    assert part.sentences[1].endswith("left out are 1 row of pocket llava-1.5 over 510 questions.")


def test_in_the_report() -> None:
    public: dict[str, CaseValue] = {"task": "pope", "kind": "public", "method": "mmtok", "budget": "4", "seed": "0"}
    public |= {"preset": "llava-1.5", "model": "llava-hf/llava-1.5-7b-hf"}
    rows = [*ROWS, row("quality", public, {"score": 0.8512, "num_questions": 9000.0, "share": 0.99})]
    page = to_markdown(make_report(frame_of(rows), [], None))
    assert "llava-hf/llava-1.5-7b-hf" in page
    assert "| 85.12 |" in page
    assert "LLaVA-1.5-7B, the paper" in page
    assert "87.7" in page


def test_coverage_and_how_well_it_tells_a_wrong_answer() -> None:
    told = {"coverage": 0.912, "coverage_bound": 0.9544, "num_lost": 12.0}
    auroc = {"lost_auroc": 0.613, "lost_auroc_low": 0.554, "lost_auroc_high": 0.671}
    rows = [
        ROWS[0],
        replace(ROWS[1], metrics={**ROWS[1].metrics, **told, **auroc}),
        replace(ROWS[3], metrics={**ROWS[3].metrics, **told}),
        ROWS[4],
        replace(scored("mmtok", "4", 4, 0.4, kind="position"), metrics={**ROWS[3].metrics, **told}),
    ]
    table = quality_part(frame_of(rows)).tables[-1]
    assert table.columns == ("method", "budget", "count", "position")
    assert table.rows == (
        ("mmtok", "25%", "91.2 (95.4), 12 lost: 0.61 (0.55 to 0.67)", ""),
        ("mmtok", "4", "91.2 (95.4), 12 lost", "91.2 (95.4), 12 lost"),
    )
