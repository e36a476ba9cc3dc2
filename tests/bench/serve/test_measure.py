from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmtok_bench.results import append_row
from mmtok_bench.run import Run
from mmtok_bench.serve.bench import _left, _Part
from mmtok_bench.serve.load import LoadGenerator
from mmtok_bench.serve.measure import ModelRun, chats_of
from mmtok_bench.serve.plan import LoadCase, Turn, plan_turns
from mmtok_bench.serve.presets import QUESTIONS
from mmtok_bench.serve.rows import BENCH, Sample
from tests.bench.serve.made_up_rows import MODEL, PLAN, load_case, row, sample

SEEDS = ["a", "b", "c", "d", "e"]


def test_every_image_has_a_question_of_its_own() -> None:
    asked = chats_of(PLAN, load_case("none", "off"), SEEDS)
    assert asked == list(zip(SEEDS, QUESTIONS, strict=False))


def test_questions_about_an_image_lie_as_far_apart_as_requests_are_under_way() -> None:
    case = replace(load_case("none", "off", concurrency=2), questions=3)
    asked = chats_of(PLAN, case, SEEDS)
    assert [seed for seed, _ in asked] == [*("ab" * 3), *("cd" * 3), *("e" * 3)]
    for seed in SEEDS:
        assert [question for each, question in asked if each == seed] == list(QUESTIONS[:3])
    asked = chats_of(replace(PLAN, images_in_turn=5), case, SEEDS)
    assert [seed for seed, _ in asked] == SEEDS * 3


def test_a_run_that_goes_on_measures_the_unpruned_server_with_what_is_left(tmp_path: Path) -> None:
    sizes_px = ((1008, 784), (224, 224))
    cases = [
        made
        for size in sizes_px
        for made in (load_case("none", "off", size_px=size), load_case("mmtok", "10%", size_px=size))
    ]
    earlier = tmp_path / "earlier.jsonl"
    append_row(earlier, row("none", "off", 100, size_px=sizes_px[0]))
    append_row(earlier, row("mmtok", "10%", 100, size_px=sizes_px[0]))
    append_row(earlier, row("none", "off", 100, size_px=sizes_px[1]))
    part = _Part(MODEL, tmp_path, [], plan_turns(cases, rounds=1, side_by_side=True))
    left = _left(PLAN, part, Run(BENCH, tmp_path, resume=earlier))
    assert [case for turn in left for case in turn.cases] == [cases[3], cases[2]]
    append_row(earlier, row("mmtok", "10%", 100, size_px=sizes_px[1]))
    assert _left(PLAN, part, Run(BENCH, tmp_path, resume=earlier)) == []


@pytest.mark.parametrize("off_dies", [False, True])
def test_rows_are_written_with_their_ratios_as_soon_as_both_servers_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_dies: bool
) -> None:
    off, pruned = load_case("none", "off"), load_case("mmtok", "10%")
    plan, run = replace(PLAN, rounds=2), Run(BENCH, tmp_path)
    pool = SimpleNamespace(dead={off.side: "died"} if off_dies else {}, start_all=lambda _: None, get=lambda _: None)
    measured = ModelRun(plan, MODEL, tmp_path, pool, LoadGenerator(), run)  # type: ignore[arg-type]
    monkeypatch.setattr(measured, "_check", lambda *_: None)
    monkeypatch.setattr(measured, "_warm_up", lambda *_: 100)
    written: list[int] = []

    def sampled(_server: object, turn: Turn, case: LoadCase, _kept: int) -> Sample:
        written.append(len(run.rows))
        return sample(case, {"off": 300, "10%": 100}[case.budget] * (turn.round_idx + 1))

    monkeypatch.setattr(measured, "_sample", sampled)
    measured.measure([off.side, pruned.side], plan_turns([off, pruned], rounds=2, side_by_side=True))
    rows = {str(each.case["budget"]): each for each in run.rows}
    assert "ttft_p50_gain" not in rows.get("off", rows["10%"]).metrics
    if off_dies:
        assert list(rows) == ["10%"]
        return
    # The last that is measured is the unpruned server: the order turns around.
    assert written == [0, 0, 0, 0]
    assert list(rows) == ["off", "10%"]
    assert rows["10%"].metrics["ttft_p50_gain"] == pytest.approx(3)
