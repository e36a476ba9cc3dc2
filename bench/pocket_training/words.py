"""The vocabulary of the pocket models: each word is one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mmtok_bench.pocket.questions import plural
from mmtok_bench.pocket.scenes import CHARACTERS, COLOR_RGB, SHAPES, SIZE_PX

__all__ = ["WORDS", "word_tokenizer"]

WORDS = (
    *(*COLOR_RGB, *SHAPES, *map(plural, SHAPES), *SIZE_PX),
    *(*(character.lower() for character in CHARACTERS), "top", "bottom", "left", "right", "yes", "no"),
    *("nothing", "middle", "is", "there", "a", "the", "in", "image", "how", "many", "thing"),
    *("things", "are", "where", "what"),
    *("digit", "letter", "color", "shape", "size", "user", "assistant", "?", ":", ".", ",", "an", "of", "and", "it"),
    *("on", "do", "you", "see", "picture", "object", "answer", "question", "using", "single", "word", "or", "phrase"),
)
"""All words, lower case."""


def word_tokenizer(special: Sequence[str], *, first: str = "", **roles: Any) -> Any:
    """Returns a fast tokenizer of lower-case words and marks.

    Args:
        special: Special tokens, `<unk>` among them.
        first: Token that is put before every text; empty for none.
        **roles: `eos_token` and others, as `PreTrainedTokenizerFast` takes them.
    """
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*special, *WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, vocabulary[first])]
        )
    tokenizer.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **roles)
