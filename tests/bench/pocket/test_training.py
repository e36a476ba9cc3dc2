"""Training: patch targets by hand, questions that do not see each other, and a run that can be left and taken up."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmtok_deploy.bench.pocket import training, training_data
from mmtok_deploy.bench.pocket.model import NUM_IMAGE_TOKENS, make_model, make_processor
from mmtok_deploy.bench.pocket.questions import Question
from mmtok_deploy.bench.pocket.scenes import Glyph, Scene, Thing, draw
from mmtok_deploy.bench.pocket.training import Stage, Training
from mmtok_deploy.bench.pocket.training_data import PATCH_CHOICES, TrainingScenes, patch_targets

CPU = torch.device("cpu")
STAGES = (Stage("patches", 3, 2, 1e-3), Stage("answers", 3, 2, 1e-3))
SCENE = Scene((Thing("green", "square", "large", 28, 84, 32),), (Glyph("K", 92, 20, is_dark=False),), 1)


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
    where, middles = training_data._looks(SCENE, questions)
    is_green = torch.tensor(["green" in words(target) for target in patch_targets(SCENE)])
    assert torch.equal(where[0].bool(), is_green)
    assert [each.nonzero().flatten().tolist() for each in middles[:2]] == [[10 * 14 + 3], [2 * 14 + 11]]
    assert where[1, 2 * 14 + 11] == 1
    assert where[2:].sum() == middles[2:].sum() == 0

    tokenizer = make_processor().tokenizer
    packed = TrainingScenes("answers", 0, tokenizer)._packed(questions)
    after = [tokenizer.decode(packed["ids"][(packed["segments"] == n) & packed["has_named"]]) for n in (1, 2, 3)]
    assert [text.replace("?", " ?").split()[:2] for text in after] == [
        ["square", "?"],
        ["letter", "is"],
        ["red", "thing"],
    ]


def test_where_heads_look_is_what_the_model_attends_to() -> None:
    language_model = make_model(make_processor(), 0).eval().model.language_model
    language_model.set_attn_implementation("eager")
    attention = language_model.layers[1].self_attn
    with torch.no_grad(), training._inputs_of(attention) as attended:
        output = language_model(inputs_embeds=torch.randn(2, 9, 192), output_attentions=True, use_cache=False)
        logits = training.where_heads_look(attention, **attended, num_heads=2, num_before=5)
    attended_to = output.attentions[1][:, :2, 5:, :5]
    torch.testing.assert_close(logits.softmax(-1), attended_to / attended_to.sum(-1, keepdim=True))


def test_a_packed_question_is_answered_as_if_it_were_alone() -> None:
    processor = make_processor()
    model = make_model(processor, 0).eval()
    first, second = (processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("is it red ?", "no"))
    image = torch.randn(1, 5, 192)

    def run(ids: list[int], segments: list[int]) -> torch.Tensor:
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        marks = torch.tensor([[0] * 5 + segments])
        with torch.no_grad():
            output = model.model.language_model(
                inputs_embeds=torch.cat([image, embedded], dim=1),
                attention_mask=training._mask(marks),
                position_ids=training._positions(marks),
                use_cache=False,
            )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[0, 5:]

    together = run(first + second, [1] * len(first) + [2] * len(second))
    torch.testing.assert_close(together[: len(first)], run(first, [1] * len(first)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[len(first) :], run(second, [1] * len(second)), atol=1e-5, rtol=1e-5)


def test_a_training_that_was_left_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole", 7, CPU, STAGES)
    whole.run(lambda step, stage, figures: None, save_every=1)

    def leave_at(last: int) -> Callable[[int, Stage, dict[str, float]], None]:
        def leave(step: int, stage: Stage, figures: dict[str, float]) -> None:
            if step == last:
                raise KeyboardInterrupt

        return leave

    for last in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            Training(tmp_path / "parts", 7, CPU, STAGES).run(leave_at(last), save_every=1)
    parts = Training(tmp_path / "parts", 7, CPU, STAGES)
    parts.run(lambda step, stage, figures: None, save_every=1)
    assert parts.num_steps_done == whole.num_steps_done == 6
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_a_state_of_another_seed_is_refused(tmp_path: Path) -> None:
    Training(tmp_path, 7, CPU, STAGES[:1]).run(lambda step, stage, figures: None)
    with pytest.raises(ValueError, match="seed 7, not 8"):
        Training(tmp_path, 8, CPU, STAGES[:1]).run(lambda step, stage, figures: None)


def test_the_checkpoint_is_a_llava_that_sees_196_tokens(tmp_path: Path) -> None:
    folder = Training(tmp_path, 0, CPU, STAGES).save_checkpoint()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "Is there a red star in the image?"}],
            }
        ],
        add_generation_prompt=True,
    )
    inputs = processor(text=text, images=draw(SCENE), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == NUM_IMAGE_TOKENS
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 2
