from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from mmtok_bench.families import PocketFamily
from mmtok_bench.pocket import PICTURE_PX, pocket_checkpoint
from mmtok_bench.pocket.questions import KINDS, PAGE_KINDS, make_scenes, picture_of
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.quality.plan import METHODS_INSIDE, Setting, read_answers
from mmtok_bench.results import read_rows
from mmtok_deploy.cli import main
from mmtok_deploy.config import KeySource
from pocket_training import pruned_answers
from tests.runtime.hand_pruned import HandPruned

METHODS = ("mmtok", "mmtok+output")


@pytest.mark.slow
@pytest.mark.parametrize("family", get_args(PocketFamily))
def test_answers_are_those_of_the_judge_of_every_server(family: PocketFamily, tmp_path: Path) -> None:
    path, rows = tmp_path / "pocket.answers", tmp_path / "pocket.jsonl"
    arguments = [f"--family={family}", "--budgets=all,auto", "--seeds=3", "--num-questions=2", str(path)]
    assert main(["pocket", "answers", "--methods=mmtok,mmtok+output", *arguments, f"--rows={rows}"]) == 0
    answers = read_answers(path)
    assert list(answers) == [Setting("unpruned", "all", 3), *(Setting(each, "auto", 3) for each in METHODS)]
    found = {(row.case["method"], row.case["kind"]): row for row in read_rows(rows)}
    assert list(found) == [(method, kind) for method in ("unpruned", *METHODS) for kind in KINDS]
    for (method, kind), row in found.items():
        assert (row.backend, row.case["seed"]) == ("transformers", "3")
        # A single scene has no interval.
        scenes = {each.scene for each in answers[Setting("mmtok", "auto", 3)] if each.kind == kind}
        assert ("gain" in row.metrics) == (method == "mmtok+output" and len(scenes) > 1)
    kept = {each.kind: each.num_image_tokens for each in answers[Setting("mmtok", "auto", 3)]}
    assert kept == {"existence": 21, "count": 49, "position": 9, "reading": 98}
    judge = HandPruned(family, pocket_checkpoint(family))
    pictures = {
        each.index: picture_of(each.scene, PICTURE_PX.get(family, SCENE_PX)).convert("RGB")
        for each in make_scenes(3, 2)
    }
    for answer in (each for of_budget in answers.values() for each in of_budget):
        parts = [{"type": "image"}, {"type": "text", "text": answer.question}]
        prompt = judge.prompt([{"role": "user", "content": parts}])
        budget = None if answer.budget == "all" else answer.num_image_tokens
        keys: KeySource = "output" if answer.method == "mmtok+output" else "input"
        pruned = judge.prune(prompt, [pictures[answer.scene]], [answer.question], budget, keys=keys)
        said = judge.processor.tokenizer(answer.said.strip(), add_special_tokens=False)["input_ids"]
        # The first word decides between the answers to a question.
        assert int(judge.logprobs(pruned, said[:1])[0].argmax()) == said[0]


@pytest.mark.parametrize("method", METHODS_INSIDE)
def test_what_is_dropped_inside_the_language_model_is_not_served(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quality", f"--methods=mmtok,{method}", "--budgets=25%", "--dry-run"]) == 2
    assert f"{method} leaves tokens out inside the language model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods=mmtok,evs"], "evs goes by the frames of a video"),
        (["--methods=visionzip", "--family=qwen2.5-vl"], "qwen2.5-vl does not run visionzip"),
        (["--methods=downsample"], "downsample makes images smaller"),
        (["--methods=mmtok+agent"], "method is one of"),
        (["--budgets=25%@0.5"], "is not understood"),
    ],
)
def test_plans_that_cannot_be_answered_are_wrong_usage(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pruned_answers, "PocketModel")
    path = tmp_path / "pocket.answers"
    assert main(["pocket", "answers", "--budgets=25%", *given, str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_answers_of_methods_inside_the_language_model(tmp_path: Path) -> None:
    path = tmp_path / "pocket.answers"
    methods = f"--methods={','.join(METHODS_INSIDE)}"
    arguments = [methods, "--budgets=all,25%", "--seeds=3", "--num-questions=1", str(path)]
    assert main(["pocket", "answers", *arguments]) == 0
    unpruned, *pruned = read_answers(path).values()
    assert {each.num_image_tokens for each in unpruned} == {196}
    assert {(each.method, each.num_image_tokens) for given in pruned for each in given} == {
        (method, 49) for method in METHODS_INSIDE
    }
    # A later run adds its answers, and scores those alone.
    rows = tmp_path / "rows.jsonl"
    later = ["--methods=mmtok", "--budgets=4", "--seeds=3", "--num-questions=1", f"--rows={rows}", str(path)]
    assert main(["pocket", "answers", *later]) == 0
    assert len(read_answers(path)) == 4
    assert {(row.case["method"], row.case["budget"]) for row in read_rows(rows)} == {("mmtok", "4")}


@pytest.mark.slow
def test_pages_are_read_by_the_model_that_was_trained_on_them(tmp_path: Path) -> None:
    rows = tmp_path / "pages.jsonl"
    arguments = ["--pages", "--methods=mmtok", "--budgets=all,5%", "--seeds=7", "--num-questions=16"]
    command = [
        "pocket",
        "answers",
        "--family=qwen2.5-vl",
        *arguments,
        f"--rows={rows}",
        str(tmp_path / "pages.answers"),
    ]
    assert main(command) == 0
    found = {(row.case["budget"], row.case["kind"]): row.metrics["accuracy"] for row in read_rows(rows)}
    assert [kind for budget, kind in found if budget == "all"] == list(PAGE_KINDS)
    assert {row.case["model"] for row in read_rows(rows)} == {"pocket qwen2.5-vl-pages"}
    for kind in PAGE_KINDS:
        # 16 questions: one of a thousand runs of a model that answers 95% of them has less.
        assert found["all", kind] >= 0.7
        assert found["5%", kind] < found["all", kind]
