"""The pocket models still answer as well as it was recorded to, pruned to a quarter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy import stats

from mmtok_bench.families import FamilyName
from mmtok_bench.pocket import PICTURE_PX
from mmtok_bench.quality.plan import QualityPlan, answers_beside, read_answers
from mmtok_bench.quality.recorded import (
    RECORDED_BUDGET,
    RECORDED_METHOD,
    read_recorded,
    record,
)
from mmtok_bench.quality.sweep import Sweep
from mmtok_bench.results import CaseValue
from mmtok_bench.run import Run
from mmtok_bench.server import SglangServer
from tests.bench.report.rows import row

RECORDED = read_recorded()
# One failure by chance in a thousand runs of a kind.
LEVEL = 0.001


@pytest.mark.slow
@pytest.mark.parametrize("num_questions", [40, 100])
@pytest.mark.parametrize("family", RECORDED)
def test_accuracy_is_not_below_the_recorded_one(
    family: FamilyName, num_questions: int, pocket_model_of: Callable[[FamilyName], SglangServer], tmp_path: Path
) -> None:
    plan = QualityPlan(methods=(RECORDED_METHOD,), budgets=(RECORDED_BUDGET,), seeds=(0,), num_questions=num_questions)
    run = Run("quality", tmp_path)
    sweep = Sweep(plan, run, "pocket", picture_px=PICTURE_PX[family])
    sweep.prepare()
    sweep.ask_all(pocket_model_of(family).client(), num_at_once=32)
    (answers,) = read_answers(answers_beside(run.path)).values()
    right = Counter(str(answer.kind) for answer in answers if answer.is_right)
    for kind, accuracy in RECORDED[family]["accuracy"].items():
        found = stats.binomtest(right[kind], num_questions, accuracy, alternative="less")
        assert found.pvalue > LEVEL, f"{kind}: {right[kind]} of {num_questions} right, {accuracy:.1%} recorded"


def case(**changes: CaseValue) -> dict[str, CaseValue]:
    set_out: dict[str, CaseValue] = {"task": "pocket", "kind": "count", "method": "mmtok", "budget": "25%"}
    return {**set_out, "seed": "all", "question_set": "abc", **changes}


def test_what_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "recorded.json"
    assert read_recorded(path) == {}
    others = [
        row("quality", case(**{key: other}), {"accuracy": 0.1}) for key, other in (("budget", "4"), ("seed", "0"))
    ]
    record([*others, row("quality", case(), {"accuracy": 0.81236})], "qwen2.5-vl", path)
    recorded = {"accuracy": {"count": 0.8124}, "num_questions": {"count": 20}, "question_set": "abc"}
    recorded |= {"commit": "bbbbbbb", "time": others[0].time}
    assert read_recorded(path) == {"qwen2.5-vl": recorded}
    record([row("quality", case(), {"accuracy": 0.5})], "llava-1.5", path)
    assert read_recorded(path) == {"llava-1.5": {**recorded, "accuracy": {"count": 0.5}}, "qwen2.5-vl": recorded}


def test_nothing_to_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to record"):
        record([row("quality", case(method="even"), {"accuracy": 0.5})], "llava-1.5", tmp_path / "recorded.json")
