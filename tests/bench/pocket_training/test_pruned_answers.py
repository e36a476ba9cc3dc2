from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from mmtok_bench.families import PocketFamily
from mmtok_bench.pocket import PICTURE_PX, pocket_checkpoint
from mmtok_bench.pocket.questions import KINDS, make_scenes, picture_of
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.quality.plan import Setting, read_answers
from mmtok_bench.results import read_rows
from mmtok_deploy.cli import main
from mmtok_deploy.config import KeySource
from tests.runtime.hand_pruned import HandPruned

METHODS = ("mmtok", "mmtok+output")


@pytest.mark.parametrize("family", get_args(PocketFamily))
def test_answers_are_those_of_the_judge_of_every_server(family: PocketFamily, tmp_path: Path) -> None:
    path, rows = tmp_path / "pocket.answers", tmp_path / "pocket.jsonl"
    arguments = [f"--family={family}", "--budgets=all,auto", "--seeds=3", "--num-questions=2", str(path)]
    assert main(["pocket", "answers", "--methods=mmtok,mmtok+output", *arguments, f"--rows={rows}"]) == 0
    answers = read_answers(path)
    assert list(answers) == [Setting("unpruned", "all", 3), *(Setting(each, "auto", 3) for each in METHODS)]
    found = {(row.case["method"], row.case["kind"]): row for row in read_rows(rows)}
    assert list(found) == [(method, kind) for method in ("unpruned", *METHODS) for kind in KINDS]
    for (method, _), row in found.items():
        assert (row.backend, row.case["seed"]) == ("transformers", "3")
        assert ("gain" in row.metrics) == (method == "mmtok+output")
    kept = {each.kind: each.num_image_tokens for each in answers[Setting("mmtok", "auto", 3)]}
    assert kept == {"existence": 21, "count": 49, "position": 9, "reading": 49}
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
