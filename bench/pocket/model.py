"""The pocket model's architecture, its words, and its processor: a LLaVA-1.5 of 2.7 million parameters."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mmtok_deploy.bench.pocket.scenes import CHARACTERS, COLOR_RGB, SCENE_PX, SHAPES, SIZE_PX

__all__ = ["NUM_IMAGE_TOKENS", "PATCH_PX", "WORDS", "make_model", "make_processor"]

PATCH_PX = 8
NUM_IMAGE_TOKENS = (SCENE_PX // PATCH_PX) ** 2

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *(*COLOR_RGB, *SHAPES, *(f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES), *SIZE_PX),
    *(*(character.lower() for character in CHARACTERS), "top", "bottom", "left", "right", "yes", "no"),
    *(
        "nothing",
        "middle",
        "is",
        "there",
        "a",
        "the",
        "in",
        "image",
        "how",
        "many",
        "thing",
        "things",
        "are",
        "where",
        "what",
    ),
    *("digit", "letter", "color", "shape", "size", "user", "assistant", "?", ":", ".", ",", "an", "of", "and", "it"),
    *("on", "do", "you", "see", "picture", "object", "answer", "question", "using", "single", "word", "or", "phrase"),
)
"""All words, lower case."""

# One template for chats and for training: a user's turn with the image first, then the assistant's.
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ' : ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image_url' in content %}{{ '<image> ' }}{% endif %}"
    "{% endfor %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)


def make_processor() -> Any:
    """Returns the LlavaProcessor: images of any size to 112 x 112 px, text to lower-case words."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*_SPECIAL, *WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
    )
    # CLIP's: shortest edge to 112 px, the middle cut out.
    image_processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": SCENE_PX}, crop_size={"height": SCENE_PX, "width": SCENE_PX}
    )
    return transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def make_model(processor: Any, seed: int) -> Any:
    """Returns the untrained `LlavaForConditionalGeneration`, float32, with weights drawn from `seed`.

    The tower's position embeddings start as two-dimensional sines and cosines: neighbours are alike from the start.
    The language model's attention starts by looking for what is alike.
    """
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=2048,
            # Slow rotations: what a token is can be compared over the length of an image.
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.05,
            tie_word_embeddings=True,
        ),
        vision_config=transformers.CLIPVisionConfig(
            image_size=SCENE_PX,
            patch_size=PATCH_PX,
            hidden_size=128,
            intermediate_size=512,
            # LLaVA reads the last layer but one: the fifth is never run.
            num_hidden_layers=5,
            num_attention_heads=4,
            projection_dim=128,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        positions = model.model.vision_tower.embeddings.position_embedding.weight
        positions[1:] = 0.5 * _sines(SCENE_PX // PATCH_PX, positions.shape[1])
        for layer in model.model.language_model.layers:
            _attend_to_the_like(layer.self_attn)
    return model


def _attend_to_the_like(attention: Any) -> None:
    """Adds to an attention's weights what makes a token look at tokens like itself and add what it sees to itself.

    Each head sees a random subspace, its queries as its keys. Without it the first thousand steps answer questions
    without looking.

    Source: mimetic initialization (arXiv 2305.09828, section 4).
    """
    num_heads, width = attention.config.num_attention_heads, attention.config.hidden_size
    heads = torch.linalg.qr(torch.randn(num_heads, width, attention.head_dim))[0].mT.reshape(-1, width)
    attention.q_proj.weight += 0.8 * heads
    attention.k_proj.weight += 0.8 * heads
    attention.v_proj.weight += 0.5 * heads
    attention.o_proj.weight += 0.5 * heads.T


def _sines(side: int, width: int) -> torch.Tensor:
    """Returns [side * side, width]: a quarter of the columns each for sin and cos of the row and of the column."""
    rates = torch.logspace(0, -1.5, width // 4) * torch.pi / 2
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = zip(*itertools.product(range(side), range(side)), strict=True)
    return torch.cat([waves[list(rows)], waves[list(columns)]], dim=1)
