from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmtok_bench.client import RequestError, image_url, openai_client
from mmtok_bench.pocket.questions import Kind, make_scenes, picture_of
from mmtok_bench.quality.plan import WITH_AGENT, QualityPlan, Setting, answers_beside, read_answers
from mmtok_bench.quality.sweep import NotPrunedError, Sweep, _fields
from mmtok_bench.results import read_rows
from mmtok_bench.run import Run
from tests.bench.quality.stand_in import TOKENS, Reply, budget_of, completion, question_of, says, serving
from tests.bench.report.rows import selector_rows, write

KINDS: tuple[Kind, ...] = ("existence", "count")
PLAN = QualityPlan(methods=("mmtok", "even"), budgets=("4", "all"), seeds=(0, 1), kinds=KINDS, num_questions=12)


def run(plan: QualityPlan, path: Path, reply: Reply, model: str = "pocket") -> tuple[Sweep, int]:
    """Returns the sweep, and how many requests it took."""
    asked: list[str] = []

    def counted(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, answer = reply(body)
        if status == 200:
            asked.append(budget_of(body))
        return status, answer

    path.touch()
    sweep = Sweep(plan, Run("quality", path.parent, resume=path), model)
    sweep.prepare()
    with serving(counted) as url:
        sweep.ask_all(openai_client(url), num_at_once=8)
    return sweep, len(asked)


def blind_below(num_tokens: int) -> Reply:
    """Says "no" to whatever is asked below that many tokens, and "yes" from there on."""

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        kept = TOKENS[budget_of(body)]
        return 200, completion("yes" if kept >= num_tokens else "no", kept)

    return reply


def test_every_setting_and_seed_has_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    sweep, asked = run(PLAN, path, says("yes"))
    assert asked == PLAN.num_requests == 3 * 2 * 2 * 12
    rows = read_rows(path)
    cases = {tuple(row.case[key] for key in ("method", "budget", "seed", "kind")) for row in rows}
    settings = [("unpruned", "all"), ("mmtok", "4"), ("even", "4")]
    assert PLAN.pairs() == settings
    assert cases == {(*setting, seed, kind) for setting in settings for seed in ("0", "1", "all") for kind in KINDS}
    assert [row.case["seed"] for row in sweep.rows()] == ["all"] * 6
    assert set(read_answers(answers_beside(path))) == {
        Setting(*setting, seed) for setting in settings for seed in (0, 1)
    }


def test_a_smaller_image_is_asked_whole_once_and_pruned_by_every_method() -> None:
    plan = replace(PLAN, methods=("mmtok", "downsample"), budgets=("4", "4@0.5", "auto", "all@0.5", "all"))
    pairs = [("unpruned", "all"), ("unpruned", "all@0.5"), ("mmtok", "4"), ("downsample", "4"), ("mmtok", "4@0.5")]
    pairs.append(("mmtok", "auto"))
    assert plan.pairs() == pairs
    scaled = {"mmtok_encoder_scale": 0.5}
    assert [_fields(Setting(*pair, 3)) for pair in pairs] == [
        {"mmtok_budget": "all"},
        {"mmtok_budget": "all"} | scaled,
        {"mmtok_budget": "4", "mmtok_method": "mmtok", "mmtok_seed": 3},
        {"mmtok_budget": "4", "mmtok_method": "downsample", "mmtok_seed": 3},
        {"mmtok_budget": "4", "mmtok_method": "mmtok", "mmtok_seed": 3} | scaled,
        {"mmtok_budget": "auto", "mmtok_method": "mmtok", "mmtok_seed": 3},
    ]


def test_keys_of_the_projectors_output_are_a_method() -> None:
    assert _fields(Setting("mmtok+output", "4", 3)) == {
        **{"mmtok_budget": "4", "mmtok_method": "mmtok", "mmtok_keys": "output", "mmtok_seed": 3}
    }
    with pytest.raises(ValueError, match=r"divprune\+output: divprune reads no keys"):
        QualityPlan(methods=("divprune+output",))
    with pytest.raises(ValueError, match=r"method is one of mmtok, .* got 'mmtok\+input'"):
        QualityPlan(methods=("mmtok+input",))


def right_answers(plan: QualityPlan) -> dict[tuple[str, str], str]:
    """Returns the answers to the questions of seed 0, by picture and text."""
    return {
        (image_url(picture_of(asked.scene)), question.text): question.answer
        for asked in make_scenes(0, plan.num_questions, plan.kinds)
        for question in asked.questions
    }


def place_of(body: dict[str, Any]) -> tuple[str, str]:
    return body["messages"][0]["content"][0]["image_url"]["url"], question_of(body)


def test_by_how_much_the_projectors_output_is_ahead(tmp_path: Path) -> None:
    """Its answers about the scenes of one seed are right; all others, and all by its input, are "yes"."""
    plan = QualityPlan(
        methods=("mmtok", "mmtok+output"), budgets=("4",), seeds=(0, 1), kinds=KINDS[:1], num_questions=12
    )
    expected = right_answers(plan)

    def by_keys(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        place = place_of(body)
        is_output = body["mm_processor_kwargs"].get("mmtok_keys") == "output"
        return 200, completion(expected.get(place, "yes") if is_output else "yes", 4)

    sweep, _ = run(plan, tmp_path / "rows.jsonl", by_keys)
    by_input, by_output = (row.metrics for row in sweep.rows())
    assert "gain" not in by_input
    assert by_output["gain"] == 0.25
    assert 0 < by_output["gain_low"] < 0.25 < by_output["gain_high"] < 0.5


def test_metrics_of_a_constant_answer(tmp_path: Path) -> None:
    sweep, _ = run(PLAN, tmp_path / "rows.jsonl", says("yes"))
    existence = next(row for row in sweep.rows() if row.case["kind"] == "existence" and row.case["method"] == "mmtok")
    metrics = existence.metrics
    assert (metrics["accuracy"], metrics["share"], metrics["majority"], metrics["chance"]) == (0.5, 1, 0.5, 0.5)
    assert (metrics["pope_recall"], metrics["pope_precision"], metrics["pope_yes_share"]) == (1, 0.5, 1)
    assert metrics["pope_adversarial_f1"] == pytest.approx(2 / 3)
    assert (metrics["tokens_kept"], metrics["num_questions"], metrics["prompt_tokens"]) == (4, 24, 16)
    count = next(row for row in sweep.rows() if row.case["kind"] == "count")
    assert count.metrics["accuracy"] == 0
    assert "share" not in count.metrics


def test_share_of_the_unpruned_score(tmp_path: Path) -> None:
    """Unpruned "yes" and pruned "no" are each right on half: the share is 1, and it is unsure."""
    sweep, _ = run(PLAN, tmp_path / "rows.jsonl", blind_below(5))
    metrics = next(
        row for row in sweep.rows() if row.case["kind"] == "existence" and row.case["method"] == "even"
    ).metrics
    assert metrics["share"] == 1
    assert metrics["accuracy"] == 0.5
    assert metrics["pope_yes_share"] == 0


def test_how_well_coverage_tells_the_answers_that_pruning_made_wrong(tmp_path: Path) -> None:
    """Pruned answers are always "yes", unpruned ones right; the lost ones, all of which are "no", are covered less."""
    plan = QualityPlan(methods=("mmtok", "even"), budgets=("4", "all"), seeds=(0,), kinds=KINDS[:1], num_questions=40)
    expected = right_answers(plan)

    def covering(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        place = place_of(body)
        budget, method = budget_of(body), body["mm_processor_kwargs"].get("mmtok_method")
        answer = completion(expected[place] if budget == "all" else "yes", TOKENS[budget])
        covered = 0.5 if expected[place] == "no" else 0.75
        image = {"coverage": covered, "coverage_bound": 0.8} if method == "mmtok" else {"coverage": None}
        answer["choices"][0]["meta_info"] = {"mmtok": [{"images": [image]}]}
        return 200, answer

    path = tmp_path / "rows.jsonl"
    sweep, _ = run(plan, path, covering)
    told = {row.case["method"]: row.metrics for row in sweep.rows()}
    assert (told["mmtok"]["num_lost"], told["mmtok"]["lost_auroc"]) == (20, 1)
    assert told["mmtok"]["coverage"] == pytest.approx(0.625)
    assert told["mmtok"]["coverage_bound"] == pytest.approx(0.8)
    for method in ("unpruned", "even"):
        assert not {"coverage", "coverage_bound", "num_lost", "lost_auroc"} & set(told[method])
    # Answers of a run that did not ask for it go on as they are.
    answers = answers_beside(path)
    lines = [json.loads(line) for line in lines_of(answers)]
    for line in lines:
        del line["coverage"], line["coverage_bound"]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(plan, path, covering)[1] == 0


def test_going_on_asks_only_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def refuses_even(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["mm_processor_kwargs"].get("mmtok_method") == "even":
            return 500, {"error": {"message": "out of order"}}
        return says("yes")(body)

    with pytest.raises(RequestError, match="out of order"):
        run(PLAN, path, refuses_even)
    finished = path.read_text()
    assert {row.case["method"] for row in read_rows(path)} == {"unpruned", "mmtok"}
    sweep, asked = run(PLAN, path, says("yes"))
    assert asked == 2 * 2 * 12
    assert path.read_text().startswith(finished)
    assert len(sweep.rows()) == 6
    assert run(PLAN, path, says("yes"))[1] == 0
    assert len(read_rows(path)) == 3 * 3 * 2


def test_going_on_with_other_questions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    plan = QualityPlan(methods=("mmtok",), budgets=("4",), seeds=(0,), num_questions=3)
    run(plan, path, says("yes"))
    with pytest.raises(ValueError, match="answers to other questions"):
        run(QualityPlan(methods=("mmtok",), budgets=("4",), seeds=(0,), num_questions=4), path, says("yes"))


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rows", "of_next_row", "num_answers", "of_next_answer"),
    [(7, 0, 48, 0), (7, 60, 48, 0), (8, 0, 43, 0), (8, 0, 43, 100), (0, 30, 30, 30)],
    ids=["rows", "in a row", "answers", "in an answer", "all but one cell"],
)
def test_going_on_after_a_kill_loses_nothing_and_has_nothing_twice(
    num_rows: int, of_next_row: int, num_answers: int, of_next_answer: int, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    answers = answers_beside(path)
    plan = replace(PLAN, methods=("even",), num_questions=6)
    run(plan, path, says("yes"))
    rows, said = lines_of(path), lines_of(answers)
    assert (len(rows), len(said)) == (12, 48)
    path.write_text("".join(rows[:num_rows]) + "".join(rows[num_rows:])[:of_next_row])
    answers.write_text("".join(said[:num_answers]) + "".join(said[num_answers:])[:of_next_answer])
    asked = run(plan, path, says("yes"))[1]
    assert asked == 48 - 12 * (num_answers // 12)
    assert len(lines_of(answers)) == len(said)
    assert {setting: len(each) for setting, each in read_answers(answers).items()} == dict.fromkeys(plan.settings(), 12)
    cases = [row.case for row in read_rows(path)]
    assert sorted(map(str, cases)) == sorted(str(json.loads(line)["case"]) for line in rows)
    assert run(plan, path, says("yes"))[1] == 0


def test_what_a_killed_run_left_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    plan = QualityPlan(methods=("even",), budgets=("4",), seeds=(0,), kinds=KINDS, num_questions=6)
    run(plan, path, says("yes"))
    for each in (path, answers_beside(path)):
        each.write_text(each.read_text()[:-9])
    sweep = Sweep(plan, Run("quality", tmp_path, resume=path), "pocket")
    assert capsys.readouterr().err == f"the last line of {path} was cut off and is dropped\n"
    assert sweep.prepare() == [
        f"the last line of {answers_beside(path)} was cut off and is dropped",
        "not all answers of even at 4, seed 0, were written: it is asked again",
    ]
    assert Sweep(plan, Run("quality", tmp_path, resume=path), "pocket").prepare() == []
    assert sweep.num_done == 0


def test_going_on_with_another_model_or_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    plan = QualityPlan(methods=("mmtok",), budgets=("4",), seeds=(0,), num_questions=3)
    run(plan, path, says("yes"))
    with pytest.raises(ValueError, match="holds rows of pocket tasks on pocket, here are pocket tasks on other"):
        run(plan, path, says("yes"), model="other")
    with pytest.raises(ValueError, match="holds rows of selector tasks on no model"):
        run(plan, write(tmp_path / "selector.jsonl", selector_rows()), says("yes"))


def test_going_on_with_other_seeds_than_the_pooled_rows_are_of_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    two = replace(PLAN, methods=("even",), num_questions=3)
    run(replace(two, seeds=(0,)), path, says("yes"))
    assert run(two, path, says("yes"))[1] == two.num_requests // 2
    with pytest.raises(ValueError, match=r"scores over other seeds or questions than those of 0, 1, 2: .* --seeds"):
        run(replace(two, seeds=(0, 1, 2)), path, says("yes"))


def test_the_server_with_an_agent_is_asked_what_is_its_part(tmp_path: Path) -> None:
    plan = QualityPlan(methods=("mmtok", WITH_AGENT), budgets=("4",), seeds=(0,), kinds=KINDS, num_questions=4)
    agent_run = Run("quality", tmp_path)
    sweep = Sweep(plan, agent_run, "pocket")
    sweep.prepare()
    methods: list[str] = []

    def no_by(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        methods.append(body["mm_processor_kwargs"]["mmtok_method"])
        return says("no")(body)

    with serving(says("yes")) as url, serving(no_by) as agent_url:
        sweep.ask_all(openai_client(url), num_at_once=2, agent_client=openai_client(agent_url))
    path = agent_run.path
    said = {
        setting.method: {answer.said for answer in found}
        for setting, found in read_answers(answers_beside(path)).items()
    }
    assert said == {"mmtok": {"yes"}, WITH_AGENT: {"no"}}
    assert methods == ["mmtok"] * 8


def test_an_agent_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asked of a server with --mmtok-agent-url"):
        run(QualityPlan(methods=(WITH_AGENT,), budgets=("4",), seeds=(0,)), tmp_path / "rows.jsonl", says("yes"))


def test_a_server_that_does_not_prune_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(NotPrunedError, match=r"with mmtok at 4, .* as many prompt tokens as unpruned"):
        run(PLAN, path, lambda body: (200, completion("yes", 196)))
    assert {row.case["method"] for row in read_rows(path)} == {"unpruned"}
    assert {setting.method for setting in read_answers(answers_beside(path))} == {"unpruned"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("fast",)}, "method is one of"),
        ({"methods": ("mmtok", "frames")}, "frames goes by the frames of a video"),
        ({"budgets": ("150%",)}, "150%"),
        ({"budgets": ("4", "4")}, "each once"),
        ({"seeds": ()}, "at least one of seeds"),
        ({"seeds": (-1,)}, "between 0 and"),
        ({"kinds": ("simple",)}, "simple"),
        ({"num_questions": 0}, "at least 1 question"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualityPlan(**changes)
