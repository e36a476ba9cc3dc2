"""Training on images of three sizes: what is seen at each, and the model that was trained so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtok_bench.pocket import PICTURE_PX, pocket_checkpoint
from mmtok_bench.pocket.questions import make_scenes, picture_of
from mmtok_bench.pocket.scenes import Glyph, Scene, Thing
from mmtok_deploy.cli import main
from pocket_training.model import make_pocket_model
from pocket_training.training import Stage, Training
from pocket_training.training_data import patch_targets
from pocket_training.training_sizes import GRIDS, TrainingSizes
from tests.bench.pocket_training.test_training import CPU, answer, inputs_of_chat, words

SCENE = Scene((Thing("green", "square", "large", 28, 84, 32),), (Glyph("K", 62, 20, is_dark=False),), 1)
QUESTION = "Where is the green square?"


def resized(picture: Image.Image, grid: int) -> Image.Image:
    """Returns a picture at the size at which a server scales it down: 28 pixels for each token."""
    return picture.resize((28 * grid, 28 * grid), Image.Resampling.BICUBIC)


def test_patches_of_a_smaller_image_are_labelled_with_what_they_show() -> None:
    targets = patch_targets(SCENE, 7)
    assert targets.shape == (49, 6)
    # A patch has 16 of the scene's 112 pixels: the square is in rows 4 to 6 and columns 0 to 2.
    assert words(targets[5 * 7 + 1]) == ["green", "square", "large", "bottom", "left", "middle"]
    assert words(targets[4 * 7 + 1])[:3] == ["green", "square", "large"]
    # The patch is in the middle column; the character is right of the scene's middle.
    assert words(targets[1 * 7 + 3]) == ["nothing", "k", "letter", "top", "right", "middle"]
    assert words(targets[0]) == ["nothing", "nothing", "nothing", "top", "left", "nothing"]


def test_every_batch_has_one_size() -> None:
    pocket = make_pocket_model("qwen2.5-vl")
    scenes = TrainingSizes("size answers", 0, pocket.processor.tokenizer, pocket.asked, batch_size=2)
    assert [scenes.grid(index) for index in range(8)] == [14, 14, 10, 10, 7, 7, 14, 14]
    for index, grid in ((1, 14), (2, 10), (5, 7)):
        found = scenes[index]
        assert found["pixels"].shape == (3, 8 * grid, 8 * grid)
        assert found["targets"].shape == (grid**2, 6)
        assert found["looks"].shape[-1] == grid**2


@pytest.mark.parametrize("grid", GRIDS)
def test_a_scene_is_read_as_a_server_reads_the_smaller_image(grid: int, tmp_path: Path) -> None:
    trained = Training(tmp_path, "qwen2.5-vl", 0, CPU)
    processor, model = trained.pocket.processor, trained.pocket.served().eval()
    ids = processor.tokenizer(trained.pocket.asked.format(QUESTION), add_special_tokens=False)["input_ids"]
    scenes = TrainingSizes("size answers", 0, processor.tokenizer, trained.pocket.asked, batch_size=1)
    inputs = inputs_of_chat(processor, resized(picture_of(SCENE, PICTURE_PX["qwen2.5-vl"]), grid), QUESTION)
    assert inputs["image_grid_thw"].tolist() == [[1, 2 * grid, 2 * grid]]
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
        _, hidden = trained.read(scenes.pixels(SCENE, grid)[None], torch.tensor([ids]), torch.ones(1, len(ids)).long())
        found = model.lm_head(hidden[0, -1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_training_on_sizes_goes_through_all_of_them(tmp_path: Path) -> None:
    stages = (Stage("size patches", 3, 2, 1e-3), Stage("size answers", 3, 2, 1e-3))
    trained = Training(tmp_path, "qwen2.5-vl", 0, CPU, stages, start=pocket_checkpoint("qwen2.5-vl"))
    losses: list[float] = []
    trained.run(lambda step, stage, figures: losses.append(figures["loss"]))
    assert len(losses) == 6
    assert np.isfinite(losses).all()


def test_only_a_qwen_sees_several_sizes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("pocket_training.training.Training.run")
    assert main(["pocket", "train", "--sizes", "--family=llava-1.5"]) == 1
    assert "the pocket llava-1.5 sees images of one size, only qwen2.5-vl of several" in capsys.readouterr().err


def test_the_packaged_model_answers_at_every_size() -> None:
    checkpoint = pocket_checkpoint("qwen2.5-vl").with_name("qwen2.5-vl-sizes")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(checkpoint)
    asked = [
        (picture_of(scene.scene, PICTURE_PX["qwen2.5-vl"]), question)
        for scene in make_scenes(7, 16, ("position",))
        for question in scene.questions
    ]
    for grid in GRIDS:
        right = sum(
            answer(processor, model, resized(picture, grid), question.text) == question.answer
            for picture, question in asked
        )
        # Of a model that answers 95%, one of a thousand sets of 16 questions has fewer.
        assert right >= 0.7 * len(asked)
