"""Training on pages: patch targets by hand, and where the tokens of a question look."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmtok_bench.pocket import pocket_checkpoint
from mmtok_bench.pocket.pages import Entry, Page
from mmtok_bench.pocket.scenes import Glyph
from mmtok_deploy.cli import main
from pocket_training.model import make_pocket_model
from pocket_training.training import Stage, Training
from pocket_training.training_pages import PAGE_CHOICES, TrainingPages, _page_items, label_patches, page_targets

# Patches are 8 px wide: the label is in column 2, the value in columns 5 and 7 of row 3.
PAGE = Page(
    (
        Entry(
            "medium",
            Glyph("K", 20, 28, is_dark=True, size_px=12),
            (Glyph("4", 44, 28, is_dark=True, size_px=12), Glyph("7", 60, 28, is_dark=True, size_px=12)),
        ),
    ),
    "blue",
    1,
)


def words(target: torch.Tensor) -> list[str]:
    return [choice[index] for choice, index in zip(PAGE_CHOICES, target.tolist(), strict=True)]


def test_patches_are_labelled_with_their_character_and_its_number() -> None:
    targets = page_targets(PAGE, _page_items(PAGE))
    assert words(targets[3 * 14 + 2]) == ["blue", "k", "letter", "top", "left", "middle", "nothing"]
    assert words(targets[3 * 14 + 5]) == ["nothing", "4", "digit", "top", "left", "middle", "1"]
    assert words(targets[3 * 14 + 7]) == ["nothing", "7", "digit", "top", "right", "middle", "2"]
    assert words(targets[0]) == ["nothing", "nothing", "nothing", "top", "left", "nothing", "nothing"]


def test_patches_of_a_value_look_back_at_its_label() -> None:
    items = _page_items(PAGE)
    looks = label_patches(PAGE, items)
    assert torch.equal(looks.any(1), torch.from_numpy(items > 1))
    for patch in (3 * 14 + 5, 3 * 14 + 7):
        found = looks[patch].nonzero().flatten()
        assert 3 * 14 + 2 in found
        assert (found < patch).all()
        assert (items[found] == 1).all()


def test_a_question_looks_for_the_label_and_then_for_each_character() -> None:
    pocket = make_pocket_model("qwen2.5-vl")
    tokenizer = pocket.processor.tokenizer
    packed = TrainingPages("page answers", 0, tokenizer, pocket.asked)._packed(np.random.default_rng(0), PAGE)
    tokens = tokenizer.convert_ids_to_tokens(packed["ids"].tolist())
    named = packed["has_named"].tolist()
    assert tokens[named.index(True)] == "k"
    asked, answered = tokens.index("assistant"), packed["labels"].tolist()
    assert answered[: asked + 1] == [-100] * (asked + 1)
    assert tokens[asked + 1 :] == ["4", "7", "<|im_end|>"]
    # Rows 0 to 2 are K, 4 and 7; row 40 has no patches.
    assert packed["look_rows"].tolist() == [*[0] * asked, 1, 2, 40, 40]


def test_a_training_on_pages_starts_from_the_model_that_sees_scenes(tmp_path: Path) -> None:
    start = pocket_checkpoint("qwen2.5-vl")
    stages = (Stage("page patches", 1, 2, 0.0), Stage("page answers", 1, 2, 0.0))
    trained = Training(tmp_path, "qwen2.5-vl", 0, torch.device("cpu"), stages, start=start)
    figures = []
    trained.run(lambda step, stage, seen: figures.append(seen))
    assert "loss" in figures[0]
    assert "looking" in figures[1]
    again = make_pocket_model("qwen2.5-vl")
    again.load(trained.save_checkpoint())
    for name, weight in again.model.state_dict().items():
        # Saved in bfloat16, and with patches of 14 px.
        torch.testing.assert_close(weight, trained.pocket.model.state_dict()[name], atol=0.02, rtol=0.01, msg=name)


def test_only_the_family_that_reads_pages_is_trained_and_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "no pocket model of llava-1.5 reads pages, only that of qwen2.5-vl"
    asked = ["--family=llava-1.5", "--pages"]
    assert main(["pocket", "train", *asked, f"--folder={tmp_path}"]) == 1
    assert message in capsys.readouterr().err
    assert main(["pocket", "answers", *asked, "--budgets=all", str(tmp_path / "pages.answers")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "module", "kept"),
    [
        (["train", "--pages"], "pocket_training.training.Training", "artifacts/pocket/qwen2.5-vl-pages"),
        (
            ["answers", "--budgets=all", "x.answers"],
            "pocket_training.pruned_answers.answer_all",
            "seeds are in x.answers",
        ),
        (["auto", "x.answers"], "pocket_training.auto_budget.lines_of_comparison", "Stopped."),
    ],
)
def test_ctrl_c_says_what_is_kept(
    command: list[str], module: str, kept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, interrupt)
    assert main(["pocket", *command]) == 130
    assert kept in capsys.readouterr().err
