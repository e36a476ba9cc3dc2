"""Training on scenes in tiles: what a LLaVA-NeXT sees of them, and the model that was trained so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtok_bench.pocket import pocket_checkpoint
from mmtok_bench.pocket.questions import Question, make_scenes, picture_of
from mmtok_bench.pocket.scenes import draw
from mmtok_deploy.cli import main
from pocket_training import training
from pocket_training.model import make_pocket_model
from pocket_training.training import Stage, Training
from pocket_training.training_data import IGNORED, PATCH_CHOICES
from pocket_training.training_tiles import TrainingTiles
from tests.bench.pocket_training.test_training import CPU, SCENE, answer, inputs_of_chat, words

QUESTION = Question("position", "Where is the green square?", "bottom left")


def tiles() -> TrainingTiles:
    pocket = make_pocket_model("llava-next")
    return TrainingTiles("tile answers", 0, pocket.processor.tokenizer, pocket.asked)


def test_tokens_are_labelled_with_what_they_show() -> None:
    targets = tiles().targets(SCENE, 14)
    assert targets.shape == (7 * 7 + 14 * 15, 6)
    # The base tile has a patch for every 16 of the scene's 112 pixels.
    assert words(targets[5 * 7 + 1]) == ["green", "square", "large", "bottom", "left", "middle"]
    assert words(targets[0]) == ["nothing", "nothing", "nothing", "top", "left", "nothing"]
    # The crops' rows of 14 patches end with a newline, and do not show their side of the scene.
    sides = [PATCH_CHOICES.index(("top", "bottom")), PATCH_CHOICES.index(("left", "right"))]
    in_crop = targets[49 + 10 * 15 + 3]
    assert in_crop[sides].tolist() == [IGNORED, IGNORED]
    assert [PATCH_CHOICES[choice][in_crop[choice]] for choice in (0, 1, 2, 5)] == ["green", "square", "large", "middle"]
    assert (targets[49 + 14 :: 15] == IGNORED).all()
    assert (targets == IGNORED).all(1).sum() == 14


def test_what_is_asked_for_is_looked_for_in_both_resolutions() -> None:
    where, middles = tiles().looks(SCENE, [QUESTION], 14)
    assert where.shape == (12, 259)
    assert middles[0].nonzero().flatten().tolist() == [5 * 7 + 1, 49 + 10 * 15 + 3]
    assert where[0, 49 + 10 * 15 + 2] == where[0, 4 * 7 + 1] == 1
    assert where[0, 49 + 14 :: 15].sum() == where[1:].sum() == 0


def test_tiles_are_those_of_the_processor() -> None:
    picture = draw(SCENE).resize((112, 112), Image.Resampling.BICUBIC)
    pocket = make_pocket_model("llava-next")
    expected = inputs_of_chat(pocket.processor, picture, QUESTION.text)["pixel_values"][0]
    found = pocket.normalised(tiles().cut(torch.from_numpy(np.array(picture)).permute(2, 0, 1)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_scene_is_read_as_hugging_face_reads_it(tmp_path: Path) -> None:
    trained = Training(tmp_path, "llava-next", 0, CPU, start=pocket_checkpoint("llava-1.5"))
    processor, model = trained.pocket.processor, trained.pocket.served().eval()
    ids = processor.tokenizer(trained.pocket.asked.format(QUESTION.text), add_special_tokens=False)["input_ids"]
    picture = draw(SCENE).resize((112, 112), Image.Resampling.BICUBIC)
    inputs = inputs_of_chat(processor, picture, QUESTION.text)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 259
    pixels = tiles().cut(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
        _, hidden = trained.read(pixels[None], torch.tensor([ids]), torch.ones(1, len(ids)).long())
        found = model.lm_head(hidden[0, -1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_training_on_tiles_goes_through_both_stages(tmp_path: Path) -> None:
    stages = (Stage("tile patches", 2, 2, 1e-3), Stage("tile answers", 2, 2, 1e-3))
    trained = Training(tmp_path, "llava-next", 0, CPU, stages, start=pocket_checkpoint("llava-1.5"))
    losses: list[float] = []
    trained.run(lambda step, stage, figures: losses.append(figures["loss"]))
    assert len(losses) == 4
    assert np.isfinite(losses).all()


def test_a_log_says_how_far_the_training_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(training.STAGES, "llava-next", (Stage("tile patches", 2, 2, 1e-3),))
    assert main(["pocket", "train", "--family=llava-next", f"--folder={tmp_path}"]) == 0
    done, checkpoint = filter(None, capsys.readouterr().out.splitlines())
    assert re.match(r"step 2 of 2, tile patches: loss \d+\.\d\d  red ", done)
    assert checkpoint == str(tmp_path / "checkpoint")


def test_the_packaged_model_answers() -> None:
    checkpoint = pocket_checkpoint("llava-1.5").with_name("llava-next")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(checkpoint)
    asked = [
        (picture_of(scene.scene), question)
        for scene in make_scenes(7, 16, ("position", "existence"))
        for question in scene.questions
    ]
    right = sum(answer(processor, model, picture, question.text) == question.answer for picture, question in asked)
    # Of a model that answers 95%, one of a hundred thousand sets of 32 questions has fewer.
    assert right >= 0.75 * len(asked)
