from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from mmtok_bench.dummy_models import DUMMY_MODELS, make_processor, write_dummy_model
from mmtok_bench.serve.image_tokens import count_image_tokens
from mmtok_bench.serve.presets import QUESTIONS, Size

# Parameters in billions as published (language model, encoder and what joins them), within 2%.
SIZES_B = {
    "qwen2-vl-7b": 8.29,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-32b": 33.45,
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "llava-next-7b": 7.06,
    "llava-next-13b": 13.35,
    "internvl3-8b": 7.95,
    "internvl3.5-8b": 8.53,
    "qwen3-vl-8b": 8.77,
    "qwen3-vl-30b-a3b": 31.07,
    # Without the head that predicts several tokens, which Transformers does not make.
    "qwen3.5-9b": 9.41,
    "qwen3.5-35b-a3b": 35.11,
    "glm-4.1v-9b": 10.29,
    "qwen2.5-vl-0.5b": 0.5,
    "qwen3-vl-0.5b": 0.5,
    "llava-1.5-0.5b": 0.65,
}


@pytest.fixture(scope="module", params=DUMMY_MODELS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write_dummy_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_it_has_the_published_size_and_no_weights(written: tuple[str, Path]) -> None:
    name, folder = written
    is_internvl = name.startswith("internvl")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja"}
    written_config = json.loads((folder / "config.json").read_text())
    assert written_config["dtype"] == "bfloat16"
    if is_internvl:  # Transformers does not know the format in which it is published.
        config = DUMMY_MODELS[name].config(make_processor(name).tokenizer)
    else:
        config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    architecture = "InternVLChatModel" if is_internvl else type(model).__name__
    assert written_config["architectures"] == [architecture]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters / 1e9 == pytest.approx(SIZES_B[name], rel=0.02)


@pytest.mark.slow
def test_every_token_id_is_text_and_words_are_one_token(written: tuple[str, Path]) -> None:
    name, folder = written
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert len(tokenizer) == config.get("text_config", config.get("llm_config"))["vocab_size"]
    made_up = [tokenizer.decode([token_id]) for token_id in range(300, len(tokenizer) - 20, 997)]
    assert all(text.strip() and text.isascii() for text in made_up)
    if not name.startswith("qwen3.5"):
        # Whose made-up words are answers alone.
        assert tokenizer("".join(made_up), add_special_tokens=False)["input_ids"] == list(
            range(300, len(tokenizer) - 20, 997)
        )
    for question in QUESTIONS:
        num_words = len(question.replace(",", " ,").replace("?", " ?").replace(".", " .").split())
        assert len(tokenizer(question, add_special_tokens=False)["input_ids"]) == num_words


@pytest.mark.parametrize(
    ("name", "size_px", "num_tokens"),
    [
        ("qwen2-vl-7b", (1008, 672), 864),
        ("qwen2.5-vl-7b", (1008, 672), 864),
        ("qwen2.5-vl-7b", (224, 224), 64),
        ("qwen2.5-vl-0.5b", (1008, 784), 1008),
        ("qwen3-vl-8b", (1024, 768), 768),
        ("qwen3-vl-8b", (100, 100), 64),
        ("qwen3.5-9b", (1024, 768), 768),
        ("glm-4.1v-9b", (1008, 672), 864),
        ("glm-4.1v-9b", (28, 28), 9),
        ("llava-1.5-7b", (336, 336), 576),
        ("llava-1.5-13b", (1008, 672), 576),
        ("llava-1.5-0.5b", (448, 448), 1024),
        # 5 tiles of 576, and a newline token after each of the 48 rows of crops: 2880 without those.
        ("llava-next-7b", (672, 672), 2880 + 48),
        ("llava-next-13b", (672, 336), 3 * 576 + 24),
        # 4 x 3 tiles, 3 x 3 tiles, 2 x 1 tiles at twice the size; each with a thumbnail.
        ("internvl3-8b", (1024, 768), 13 * 256),
        ("internvl3-8b", (448, 448), 10 * 256),
        ("internvl3.5-8b", (448, 224), 9 * 256),
    ],
)
def test_images_become_the_papers_numbers_of_tokens(name: str, size_px: Size, num_tokens: int) -> None:
    assert count_image_tokens(make_processor(name), size_px) == num_tokens


def test_unknown_names_and_somebodys_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of qwen2-vl-7b, .* got 'gpt-2'"):
        write_dummy_model("gpt-2", tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="holds weights"):
        write_dummy_model("llava-1.5-7b", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
