"""Training: patch targets by hand, questions that do not see each other, and a run that can be left and taken up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtok_bench.families import PocketFamily
from mmtok_bench.pocket import PICTURE_PX
from mmtok_bench.pocket.questions import Question
from mmtok_bench.pocket.scenes import Glyph, Scene, Thing, draw
from pocket_training import training, training_data
from pocket_training.model import GRID, NUM_IMAGE_TOKENS, make_pocket_model
from pocket_training.training import Stage, Training
from pocket_training.training_data import PATCH_CHOICES, TrainingScenes, patch_targets

CPU = torch.device("cpu")
FAMILIES: tuple[PocketFamily, ...] = get_args(PocketFamily)
STAGES = (Stage("patches", 3, 2, 1e-3), Stage("answers", 3, 2, 1e-3))
SCENE = Scene((Thing("green", "square", "large", 28, 84, 32),), (Glyph("K", 92, 20, is_dark=False),), 1)


def enlarged(picture: Image.Image, side_px: int) -> torch.Tensor:
    """Returns [3, side_px, side_px], 0 to 255, bicubic and not rounded to whole numbers."""
    channels = [np.array(channel.convert("F").resize((side_px, side_px))) for channel in picture.split()]
    return torch.from_numpy(np.stack(channels))


def inputs_of_chat(processor: Any, picture: Image.Image | torch.Tensor, text: str) -> Any:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(text=prompt, images=picture, return_tensors="pt")


def answer(processor: Any, model: Any, picture: Image.Image, text: str) -> str:
    inputs = inputs_of_chat(processor, picture, text)
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    told: str = processor.tokenizer.decode(said, skip_special_tokens=True)
    return told.strip()


def words(target: torch.Tensor) -> list[str]:
    return [choice[index] for choice, index in zip(PATCH_CHOICES, target.tolist(), strict=True)]


def test_patches_are_labelled_with_what_they_show() -> None:
    targets = patch_targets(SCENE)
    assert targets.shape == (NUM_IMAGE_TOKENS, 6)
    # Patch (row, column): pixels from 8 * row, 8 * column.
    assert words(targets[10 * 14 + 3]) == ["green", "square", "large", "bottom", "left", "middle"]
    assert words(targets[10 * 14 + 2]) == ["green", "square", "large", "bottom", "left", "nothing"]
    assert words(targets[2 * 14 + 11]) == ["nothing", "k", "letter", "top", "right", "middle"]
    assert words(targets[0]) == ["nothing", "nothing", "nothing", "top", "left", "nothing"]


def test_what_is_named_is_looked_at_from_then_on() -> None:
    questions = [
        Question("position", "Where is the green square?", "bottom left"),
        Question("reading", "What letter is in the image?", "K"),
        Question("simple", "Is there a red thing in the image?", "no"),
    ]
    where, middles = training_data.looks_of(SCENE, questions, GRID)
    is_green = torch.tensor(["green" in words(target) for target in patch_targets(SCENE)])
    assert torch.equal(where[0].bool(), is_green)
    assert [each.nonzero().flatten().tolist() for each in middles[:2]] == [[10 * 14 + 3], [2 * 14 + 11]]
    assert where[1, 2 * 14 + 11] == 1
    assert where[2:].sum() == middles[2:].sum() == 0

    pocket = make_pocket_model("llava-1.5")
    tokenizer = pocket.processor.tokenizer
    packed = TrainingScenes("answers", 0, tokenizer, pocket.asked)._packed(questions)
    after = [tokenizer.decode(packed["ids"][(packed["segments"] == n) & packed["has_named"]]) for n in (1, 2, 3)]
    assert [text.replace("?", " ?").split()[:2] for text in after] == [
        ["square", "?"],
        ["letter", "is"],
        ["red", "thing"],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_where_heads_look_is_what_the_model_attends_to(family: PocketFamily) -> None:
    language_model = make_pocket_model(family).language_model.eval()
    language_model.set_attn_implementation("eager")
    attention = language_model.layers[1].self_attn
    with torch.no_grad(), training._inputs_of(attention) as attended:
        output = language_model(inputs_embeds=torch.randn(2, 9, 192), output_attentions=True, use_cache=False)
        logits = training.where_heads_look(attention, **attended, num_heads=2, num_before=5)
    attended_to = output.attentions[1][:, :2, 5:, :5]
    torch.testing.assert_close(logits.softmax(-1), attended_to / attended_to.sum(-1, keepdim=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_are_read_as_hugging_face_reads_each_by_itself(family: PocketFamily, tmp_path: Path) -> None:
    """The image, the template and the positions are those of a chat, and packed questions do not see each other."""
    trained = Training(tmp_path, family, 0, CPU)
    processor, model = trained.pocket.processor, trained.pocket.served().eval()
    picture = draw(SCENE).resize((112, 112))
    sent = enlarged(picture, PICTURE_PX[family])
    texts = ["Is there a red star in the image?", "Where is the green square?"]
    asked = [
        processor.tokenizer(trained.pocket.asked.format(text), add_special_tokens=False)["input_ids"] for text in texts
    ]
    with torch.no_grad():
        _, hidden = trained.read(
            torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None],
            torch.tensor([asked[0] + asked[1]]),
            torch.tensor([[1] * len(asked[0]) + [2] * len(asked[1])]),
        )
        found = model.lm_head(hidden[0, [len(asked[0]) - 1, -1]])
        for text, logits in zip(texts, found, strict=True):
            expected = model(**inputs_of_chat(processor, sent, text)).logits[0, -1]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "image"), [("llava-1.5", "<image>"), ("qwen2.5-vl", "<|vision_start|><|image_pad|><|vision_end|>")]
)
def test_a_prompt_is_found_again_in_the_text_of_its_tokens(family: PocketFamily, image: str) -> None:
    """SGLang makes text of a prompt's tokens, looks there for the image's, and makes tokens of it again."""
    processor = make_pocket_model(family).processor
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}]
    ids = processor.tokenizer(processor.apply_chat_template(chat, add_generation_prompt=True))["input_ids"]
    text = processor.tokenizer.decode(ids)
    assert image in text
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.slow
def test_a_training_that_was_left_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole", "llava-1.5", 7, CPU, STAGES)
    whole.run(lambda step, stage, figures: None, save_every=1)

    def leave_at(last: int) -> Callable[[int, Stage, dict[str, float]], None]:
        def leave(step: int, stage: Stage, figures: dict[str, float]) -> None:
            if step == last:
                raise KeyboardInterrupt

        return leave

    for last in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            Training(tmp_path / "parts", "llava-1.5", 7, CPU, STAGES).run(leave_at(last), save_every=1)
    parts = Training(tmp_path / "parts", "llava-1.5", 7, CPU, STAGES)
    parts.run(lambda step, stage, figures: None, save_every=1)
    assert parts.num_steps_done == whole.num_steps_done == 6
    for name, weight in whole.pocket.model.state_dict().items():
        torch.testing.assert_close(parts.pocket.model.state_dict()[name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    Training(tmp_path, "llava-1.5", 7, CPU, STAGES[:1]).run(lambda step, stage, figures: None)
    for family, seed in (("llava-1.5", 8), ("qwen2.5-vl", 7)):
        with pytest.raises(ValueError, match=f"llava-1.5 with seed 7, not of {family} with {seed}"):
            Training(tmp_path, family, seed, CPU, STAGES[:1]).run(lambda step, stage, figures: None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_is_of_the_family_and_sees_196_tokens(family: PocketFamily, tmp_path: Path) -> None:
    trained = Training(tmp_path, family, 0, CPU, STAGES)
    trained.run(lambda step, stage, figures: None)
    folder = trained.save_checkpoint()
    assert 4e6 < sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type == {"llava-1.5": "llava", "qwen2.5-vl": "qwen2_5_vl"}[family]
    picture = draw(SCENE, scale=4)
    inputs = inputs_of_chat(processor, picture, "Is there a red star in the image?")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == NUM_IMAGE_TOKENS
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 2
