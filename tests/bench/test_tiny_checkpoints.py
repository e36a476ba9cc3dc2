from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtok_bench import tiny_checkpoints
from mmtok_bench.families import FamilyName
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy.photographs import photograph

FAMILIES = get_args(FamilyName)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def read(checkpoint: Path, image: Image.Image) -> tuple[Any, Any]:
    """Returns the model and the processor's inputs for a question about an image."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, processor(text=[text], images=[image], return_tensors="pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "num_tokens"),
    [
        ("qwen2-vl", "coffee", 14 * 21),
        ("qwen2.5-vl", "coffee", 14 * 21),
        ("qwen2.5-vl", "astronaut", 18 * 18),
        ("qwen3-vl", "coffee", 12 * 19),
        ("qwen3-vl-moe", "astronaut", 16 * 16),
        ("qwen3.5", "coffee", 12 * 19),
        ("qwen3.5-moe", "astronaut", 16 * 16),
        ("glm-4.1v", "coffee", 14 * 21),
        ("glm-4.5v", "astronaut", 18 * 18),
        ("llava-1.5", "coffee", 576),
        ("llava-1.5", "astronaut", 576),
        # 2 x 2 crops of 24 x 24: 16 rows are padding, each row that is left ends in a newline token; the base tile.
        ("llava-next", "coffee", 576 + 32 * (48 + 1)),
        ("llava-next", "astronaut", 576 + 48 * (48 + 1)),
    ],
)
def test_transformers_reads_it_and_counts_the_tokens(
    folder: Path, family: FamilyName, name: str, num_tokens: int
) -> None:
    model, inputs = read(make_tiny_checkpoint(family, folder / family), photograph(name))
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == num_tokens
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert len(answer) == 3
    text = AutoProcessor.from_pretrained(folder / family).tokenizer.decode(answer)
    assert len(text) == 3
    assert text.isascii()
    assert text.isprintable()


@pytest.mark.parametrize(("family", "is_transposed"), [("qwen3-vl-moe", True), ("qwen3.5-moe", False)])
def test_experts_lie_as_in_the_published_checkpoint(folder: Path, family: FamilyName, is_transposed: bool) -> None:
    """[experts, in, out] of Qwen3-VL: SGLang transposes them as it loads, and so does Transformers."""
    checkpoint = make_tiny_checkpoint(family, folder / family)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        stored = file.get_tensor(name)
    assert stored.shape == ((4, 256, 2 * 96) if is_transposed else (4, 2 * 96, 256))
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert torch.equal(model.get_parameter(name), stored.transpose(1, 2) if is_transposed else stored)


def test_each_expert_of_a_glm_has_its_own_tensors(folder: Path) -> None:
    checkpoint = make_tiny_checkpoint("glm-4.5v", folder / "glm-4.5v")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16)
    together = model.get_parameter("model.language_model.layers.1.mlp.experts.down_proj")
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        names = [f"model.language_model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(4)]
        assert torch.equal(torch.stack([file.get_tensor(name) for name in names]), together)


def test_qwen_attends_within_windows_and_to_the_whole_image(folder: Path) -> None:
    model, _ = read(make_tiny_checkpoint("qwen2.5-vl", folder / "qwen2.5-vl"), photograph())
    vision = model.config.vision_config
    assert set(range(vision.depth)) > set(vision.fullatt_block_indexes) > set()


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe"])
def test_a_qwen3_5_says_what_sglang_reads_and_transformers_does_not(folder: Path, family: FamilyName) -> None:
    """Without them SGLang fails for want of the interval, and takes Qwen3-VL's levels of DeepStack."""
    config = json.loads((make_tiny_checkpoint(family, folder / family) / "config.json").read_text())
    assert config["text_config"]["layer_types"] == ["linear_attention", "full_attention"] * 2
    assert config["text_config"]["full_attention_interval"] == 2
    assert config["vision_config"]["deepstack_visual_indexes"] == []


def test_llava_next_cuts_five_tiles(folder: Path) -> None:
    _, inputs = read(make_tiny_checkpoint("llava-next", folder / "llava-next"), photograph())
    assert inputs["pixel_values"].shape == (1, 5, 3, 336, 336)


@pytest.mark.parametrize("pad_to_square", [True, False])
def test_llava_pads_to_a_square_unless_told_otherwise(tmp_path: Path, pad_to_square: bool) -> None:
    checkpoint = make_tiny_checkpoint("llava-1.5", tmp_path / "it", pad_to_square=pad_to_square)
    _, inputs = read(checkpoint, Image.new("RGB", (600, 400), "white"))
    top_row = inputs["pixel_values"][0, :, 0]
    # The padding has the mean colour, which normalising makes 0 but for rounding to 8 bits.
    assert (top_row.abs().max() < 0.02) == pad_to_square


def test_templates_speak_as_the_real_ones(folder: Path) -> None:
    prompts = {
        family: AutoProcessor.from_pretrained(make_tiny_checkpoint(family, folder / family)).apply_chat_template(
            QUESTION, add_generation_prompt=True
        )
        for family in FAMILIES
    }
    assert prompts["qwen2.5-vl"] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    # Qwen3.5 thinks first.
    assert prompts["qwen3.5"] == prompts["qwen3-vl"] + "<think>\n"
    assert prompts["glm-4.1v"] == prompts["glm-4.5v"]
    assert prompts["glm-4.1v"] == (
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>What is it?<|assistant|>\n"
    )
    assert prompts["llava-1.5"] == prompts["llava-next"] == "USER: <image>\nWhat is it? ASSISTANT:"


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    made = [make_tiny_checkpoint("llava-1.5", tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    assert weights(made[0]) == weights(made[1]) != weights(made[2])


def test_the_callers_random_numbers_go_on_as_before(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    make_tiny_checkpoint("llava-1.5", tmp_path / "it")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_complete_folder_is_reused_and_another_kind_made_again(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint("llava-1.5", tmp_path / "it")
    (checkpoint / "trace").touch()
    assert make_tiny_checkpoint("llava-1.5", checkpoint) == checkpoint
    assert (checkpoint / "trace").exists()
    make_tiny_checkpoint("llava-1.5", checkpoint, seed=1)
    assert not (checkpoint / "trace").exists()


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsavable(torch.nn.Module):
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").touch()
            raise OSError("disk full")

    monkeypatch.setattr(tiny_checkpoints, "_build", lambda *_: (Unsavable(), None))
    with pytest.raises(OSError, match="disk full"):
        make_tiny_checkpoint("llava-1.5", tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_tiny_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is no tiny checkpoint"):
        make_tiny_checkpoint("llava-1.5", tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of qwen2-vl, .*, glm-4.5v, got 'gpt-2'"):
        make_tiny_checkpoint("gpt-2", tmp_path / "it")  # type: ignore[arg-type]
