"""The commands as a user gives them, on one real server of the pocket model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmtok_bench.pocket import pocket_checkpoint
from mmtok_bench.pocket.questions import make_scenes, picture_of
from mmtok_bench.quality.lmms_eval import VERSION
from mmtok_bench.quality.plan import read_answers
from mmtok_bench.results import read_rows
from mmtok_bench.server import SglangServer
from mmtok_deploy.cli import main
from mmtok_deploy.methods import IMAGE_METHODS

LMMS_VENV = Path(os.environ.get("MMTOK_LMMS_VENV", Path(__file__).parents[3] / "artifacts" / "lmms-eval"))
TASK = """
task: pocket_existence
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 1
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""
UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


@pytest.mark.slow
def test_pocket_tasks(served_pocket_model: SglangServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method prunes to the budget, and a question that is asked again is answered as before."""
    command = ["quality", f"--url={served_pocket_model.url}", "--budgets=all,25%,4", "--seeds=0", "--num-questions=4"]
    assert main([*command, f"--results-dir={tmp_path}", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = {(row["case"]["method"], row["case"]["budget"]): row["metrics"]["tokens_kept"] for row in rows}
    methods = IMAGE_METHODS
    assert kept == {("unpruned", "all"): 196} | {
        (method, budget): tokens for method in methods for budget, tokens in (("25%", 49), ("4", 4))
    }
    covering = {row["case"]["method"] for row in rows if 0 < row["metrics"].get("coverage", 0) <= 1}
    assert covering == {"mmtok", "text-coverage", "vision-coverage"}
    (path,) = tmp_path.glob("*.jsonl")
    # Four kinds of questions: unpruned, and each method at two budgets.
    assert len(read_rows(path)) == len(rows) == (1 + 2 * len(methods)) * 4
    assert path.with_suffix(".answers").is_file()
    assert main([*command, f"--results-dir={tmp_path / 'again'}", "--methods=mmtok", "--json"]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    before = [row["metrics"]["accuracy"] for row in rows if row["case"]["method"] in ("unpruned", "mmtok")]
    assert [row["metrics"]["accuracy"] for row in again] == before


@pytest.mark.slow
def test_the_model_as_its_own_agent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quality", "--methods=mmtok,mmtok+agent", "--budgets=4", "--tasks=reading", "--seeds=0"]
    assert main([*command, "--num-questions=40", f"--results-dir={tmp_path}", "--json"]) == 0
    printed = capsys.readouterr()
    assert "The agent was asked 40 times" in printed.err
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["case"]["model"], row["case"]["method"]) for row in rows] == [
        ("pocket llava-1.5", "mmtok"),
        ("pocket llava-1.5", "mmtok+agent"),
    ]
    assert [row["metrics"]["tokens_kept"] for row in rows] == [4, 4]
    (path,) = tmp_path.glob("*.answers")
    by_question, by_agent = ([answer.said for answer in answers] for answers in read_answers(path).values())
    # What the agent says changes what is kept, and so some of the answers.
    assert by_question != by_agent


@pytest.mark.slow
def test_rows_name_the_arguments_that_a_server_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pocket_checkpoint("llava-1.5").with_name("llava-next")
    command = ["quality", "--family=llava-next", f"--model-path={model}", "--server-arg=--mmtok-share-tiles"]
    command += ["--methods=mmtok", "--budgets=all,61", "--tasks=position", "--seeds=0", "--num-questions=20"]
    assert main([*command, f"--results-dir={tmp_path}", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["case"]["model"] for row in rows} == {"pocket llava-next --mmtok-share-tiles"}
    # Five tiles by themselves would keep twelve each.
    assert [row["metrics"]["tokens_kept"] for row in rows] == [259, 61]
    assert rows[0]["metrics"]["accuracy"] > 0.9


@pytest.fixture
def local_task(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    with (folder / "questions.jsonl").open("w") as file:
        for asked in make_scenes(0, 8, ["existence"]):
            picture = folder / f"{asked.index}.png"
            picture_of(asked.scene).save(picture)
            for question in asked.questions:
                line = {"image": str(picture), "question": question.text, "answer": question.answer}
                file.write(json.dumps(line) + "\n")
    (folder / "pocket_existence.yaml").write_text(TASK.format(folder=folder))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    not (LMMS_VENV / "bin" / "lmms-eval").is_file(),
    reason=f"lmms-eval {VERSION} is not in {LMMS_VENV.name}: `mmtok quality setup` installs it (about 7 GB)",
)
def test_lmms_eval_on_local_task_files(
    served_pocket_model: SglangServer,
    local_task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["quality", f"--url={served_pocket_model.url}", "--tasks=pocket_existence", "--budgets=all"]
    command += [f"--lmms-venv={LMMS_VENV}", f"--include-path={local_task}", f"--results-dir={tmp_path}", "--json"]
    assert main(command) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["metrics"]["num_questions"] == 8
    assert row["metrics"]["score"] == row["metrics"]["lmms_exact_match"]
    # The same questions by our own harness have the same answers, and come to the same score.
    own = ["quality", f"--url={served_pocket_model.url}", "--tasks=existence", "--budgets=all", "--seeds=0"]
    assert main([*own, "--num-questions=8", f"--results-dir={tmp_path / 'own'}", "--json"]) == 0
    (expected,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["metrics"]["score"] == expected["metrics"]["accuracy"]
    (path,) = (tmp_path / "own").glob("*.answers")
    (own_answers,) = read_answers(path).values()
    (samples,) = tmp_path.rglob("*_samples_pocket_existence.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    # lmms-eval strips an answer before it keeps it.
    assert {(each["input"], each["filtered_resps"]) for each in theirs} == {
        (each.question, each.said.strip()) for each in own_answers
    }
