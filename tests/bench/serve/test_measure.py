from __future__ import annotations

from dataclasses import replace

from mmtok_bench.serve.measure import chats_of
from mmtok_bench.serve.presets import QUESTIONS
from tests.bench.serve.made_up_rows import PLAN, load_case

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
