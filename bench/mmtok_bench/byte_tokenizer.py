"""Tokenizers made from nothing: one token a byte, or one token a word as in a vocabulary of real size."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["BYTES", "Vocabulary", "byte_tokenizer"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer knows beside the 256 bytes and its special tokens.

    Args:
        text: Its words (with the space before them, punctuation by itself) are one token each.
        size: Tokens in all, special ones included: made-up words fill it, so that every token id decodes to text.
            None for no filling.
    """

    text: str = ""
    size: int | None = None


BYTES = Vocabulary()


def byte_tokenizer(
    special_tokens: Sequence[str],
    *,
    bos_token: str | None,
    eos_token: str,
    pad_token: str,
    vocabulary: Vocabulary = BYTES,
) -> Any:
    """Returns a fast tokenizer; special tokens have the highest ids.

    Raises:
        ValueError: A vocabulary that is smaller than what has to be in it.
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens += dict.fromkeys(piece for piece, _ in splitter.pre_tokenize_str(vocabulary.text) if len(piece) > 1)
    if vocabulary.size is not None:
        num_missing = vocabulary.size - len(tokens) - len(special_tokens)
        if num_missing < 0:
            raise ValueError(f"a vocabulary of {vocabulary.size} tokens is {-num_missing} too small")
        tokens += (_made_up_word(number) for number in range(num_missing))
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    # ignore_merges: a word that is a token is not put together from bytes.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=vocabulary != BYTES))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    if bos_token is not None:
        bos = (bos_token, tokenizer.token_to_id(bos_token))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", pair=f"{bos_token} $A {bos_token} $B", special_tokens=[bos]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token=pad_token,
        extra_special_tokens=[token for token in special_tokens if token not in (bos_token, eos_token, pad_token)],
    )


def _made_up_word(number: int) -> str:
    # Letters alone, so that the splitter keeps a word whole; "Ġ" is the byte-level alphabet's space.
    letters = ""
    for _ in range(4):
        number, letter = divmod(number, 26)
        letters += string.ascii_lowercase[letter]
    return f"Ġzq{letters}"
