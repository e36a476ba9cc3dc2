from __future__ import annotations

from dataclasses import replace

import pytest

from mmtok_bench.serve.plan import LoadCase, Side, are_side_by_side, plan_cases, plan_turns, sides_of
from mmtok_bench.serve.presets import SERVE_PRESETS, ServedModel, Size

PLAN = replace(SERVE_PRESETS["cpu"], concurrencies=(1, 4), image_kinds=("photograph", "random"), rounds=2)
MODEL = ServedModel("it", "qwen2.5-vl", ((1008, 784),), ("10%",))
SMALLER = (336, 252)


def smaller(size_px: Size, budget: str) -> Size | None:
    assert (size_px, budget) == ((1008, 784), "10%")
    return SMALLER


def order(cases: list[LoadCase], *, side_by_side: bool) -> list[tuple[int, int, str]]:
    turns = plan_turns(cases, rounds=2, side_by_side=side_by_side)
    return [(turn.round_idx, case.concurrency, turn.side.budget) for turn in turns for case in turn.cases]


def test_sides_differ_by_nothing_but_the_budget_and_the_cache() -> None:
    assert [side.arguments for side in sides_of(MODEL, "off")] == [
        ("--disable-radix-cache",),
        ("--disable-radix-cache", "--mmtok-budget=all"),
        ("--disable-radix-cache", "--mmtok-budget=10%"),
    ]
    kept = "--mm-preprocess-cache-size-mb=256"
    assert [side.arguments for side in sides_of(MODEL, "on")] == [
        (kept,),
        (kept, "--mmtok-budget=all"),
        (kept, "--mmtok-budget=10%"),
    ]


def test_a_smaller_image_is_a_side_without_a_counterpart_of_the_client() -> None:
    scaled = replace(MODEL, budgets=("10%@0.5", "all@0.5"))
    assert [side.arguments[1:] for side in sides_of(scaled, "off")] == [
        (),
        ("--mmtok-budget=all",),
        ("--mmtok-budget=10%", "--mmtok-encoder-scale=0.5"),
        ("--mmtok-budget=all", "--mmtok-encoder-scale=0.5"),
    ]


def test_budget_all_runs_once_whether_asked_for_or_not() -> None:
    asked = replace(MODEL, budgets=("all", "10%"))
    assert sides_of(asked, "off") == sides_of(MODEL, "off")


def test_every_workload_is_measured_on_every_side_and_with_a_smaller_image() -> None:
    cases = plan_cases(MODEL, PLAN, "off", smaller)
    assert len(cases) == 2 * 2 * 4
    first = [(case.side.budget, case.method, case.budget, case.sent_px) for case in cases[:4]]
    assert first == [
        ("off", "none", "off", (1008, 784)),
        ("all", "none", "all", (1008, 784)),
        ("10%", "mmtok", "10%", (1008, 784)),
        ("off", "downsample", "10%", SMALLER),
    ]
    assert {case.image_kind for case in cases} == {"photograph", "random"}


def test_where_only_the_server_can_make_images_smaller_it_is_asked_to() -> None:
    cases = plan_cases(MODEL, PLAN, "off", lambda size_px, budget: size_px)
    smaller = [case for case in cases if case.method == "downsample"]
    assert len(smaller) == 2 * 2
    assert {(case.side.budget, case.sent_px) for case in smaller} == {("10%", (1008, 784))}
    for case in cases:
        asks = {"mm_processor_kwargs": {"mmtok_method": "downsample"}} if case in smaller else {}
        assert case.request_fields == asks


def test_one_server_is_asked_for_every_budget() -> None:
    plan = replace(PLAN, one_server=True)
    model = replace(MODEL, budgets=("10%", "25%@0.5", "all@0.5"), most_at_once=9)
    assert [side.budget for side in sides_of(model, "off", one_server=True)] == ["off", "all"]
    assert not are_side_by_side(plan, model)
    sizes = {"10%": SMALLER, "25%@0.5": None, "all@0.5": None}
    cases = plan_cases(model, plan, "off", lambda size_px, budget: sizes[budget])
    assert [(case.side.budget, case.method, case.budget, case.request_fields) for case in cases[:6]] == [
        ("off", "none", "off", {}),
        ("all", "none", "all", {}),
        ("all", "mmtok", "10%", {"mm_processor_kwargs": {"mmtok_budget": "10%"}}),
        ("all", "mmtok", "25%@0.5", {"mm_processor_kwargs": {"mmtok_budget": "25%", "mmtok_encoder_scale": 0.5}}),
        ("all", "mmtok", "all@0.5", {"mm_processor_kwargs": {"mmtok_budget": "all", "mmtok_encoder_scale": 0.5}}),
        ("off", "downsample", "10%", {}),
    ]
    # The server makes images of a LLaVA smaller.
    (case,) = {
        case
        for case in plan_cases(
            replace(model, budgets=("10%",)),
            replace(plan, concurrencies=(1,), image_kinds=("photograph",)),
            "off",
            lambda size_px, budget: size_px,
        )
        if case.method == "downsample"
    }
    assert case.request_fields == {"mm_processor_kwargs": {"mmtok_budget": "10%", "mmtok_method": "downsample"}}
    # Drift affects all budgets alike.
    first, second, third, fourth = plan_turns(cases[:6], rounds=2, side_by_side=False)
    assert (first.cases, second.cases) == (fourth.cases[::-1], third.cases[::-1])
    assert len(second.cases) == 4


def test_other_methods_are_asked_of_the_servers_with_a_budget() -> None:
    plan = replace(PLAN, other_methods=("divprune", "dart"), concurrencies=(1,), image_kinds=("photograph",))
    model = replace(MODEL, budgets=("10%", "all@0.5"))
    cases = plan_cases(model, plan, "off", lambda size_px, budget: SMALLER if budget == "10%" else None)
    assert [(case.side.budget, case.method, case.request_fields, case.has_own_images) for case in cases] == [
        ("off", "none", {}, False),
        ("all", "none", {}, False),
        ("10%", "mmtok", {}, False),
        ("all@0.5", "mmtok", {}, False),
        *(("10%", method, {"mm_processor_kwargs": {"mmtok_method": method}}, True) for method in plan.other_methods),
        ("off", "downsample", {}, False),
    ]


def test_where_no_smaller_image_has_fewer_tokens_there_is_no_such_row() -> None:
    cases = plan_cases(MODEL, PLAN, "off", lambda size_px, budget: None)
    assert {case.method for case in cases} == {"none", "mmtok"}


def test_random_images_are_never_seen_twice() -> None:
    assert {case.image_kind for case in plan_cases(MODEL, PLAN, "on", smaller)} == {"photograph"}
    only_random = replace(PLAN, image_kinds=("random",))
    assert plan_cases(MODEL, only_random, "on", smaller) == []


def test_several_questions_are_asked_about_photographs_alone() -> None:
    cases = plan_cases(MODEL, replace(PLAN, questions_per_image=(1, 6)), "on", smaller)
    assert {(case.image_kind, case.questions) for case in cases} == {("photograph", 1), ("photograph", 6)}
    cases = plan_cases(MODEL, replace(PLAN, questions_per_image=(6,)), "off", smaller)
    assert {(case.image_kind, case.questions) for case in cases} == {("photograph", 6)}
    assert len({case.workload for case in cases}) == 2


def test_servers_that_fit_a_gpu_together_run_side_by_side() -> None:
    plan = SERVE_PRESETS["h200"]
    fits = replace(MODEL, most_at_once=3)
    assert [are_side_by_side(plan, model) for model in (MODEL, fits, replace(fits, budgets=("10%", "5%")))] == [
        *(False, True, False)
    ]
    assert are_side_by_side(SERVE_PRESETS["cpu"], MODEL)


def test_side_by_side_servers_alternate_after_every_workload() -> None:
    cases = plan_cases(MODEL, replace(PLAN, image_kinds=("photograph",)), "off", lambda *_: None)
    forwards, backwards = ["off", "all", "10%"], ["10%", "all", "off"]
    assert order(cases, side_by_side=True) == [
        *((0, 1, budget) for budget in forwards),
        *((0, 4, budget) for budget in backwards),
        *((1, 1, budget) for budget in forwards),
        *((1, 4, budget) for budget in backwards),
    ]


def test_one_server_at_a_time_measures_everything_before_the_next_is_started() -> None:
    cases = plan_cases(MODEL, replace(PLAN, image_kinds=("photograph",)), "off", lambda *_: None)
    forwards = [(0, concurrency, budget) for budget in ("off", "all", "10%") for concurrency in (1, 4)]
    backwards = [(1, concurrency, budget) for budget in ("10%", "all", "off") for concurrency in (4, 1)]
    assert order(cases, side_by_side=False) == forwards + backwards


@pytest.mark.parametrize("side_by_side", [True, False])
def test_every_cell_is_measured_once_a_round_by_its_own_side(side_by_side: bool) -> None:
    cases = plan_cases(MODEL, PLAN, "off", smaller)
    turns = plan_turns(cases, rounds=3, side_by_side=side_by_side)
    for round_idx in range(3):
        measured = [case for turn in turns if turn.round_idx == round_idx for case in turn.cases]
        assert sorted(map(repr, measured)) == sorted(map(repr, cases))
    assert all(case.side == turn.side for turn in turns for case in turn.cases)
    assert Side("off", "off") in {turn.side for turn in turns}
