"""The token ids of guidance, made in a thread beside the event loop."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmtok_deploy.guidance import guidance_words
from mmtok_sglang.refusals import refusal
from mmtok_sglang.settings import Settings

__all__ = ["GuidanceTokenizer", "tokenizer_of"]


class GuidanceTokenizer:
    """Tokenises and decodes in a thread of its own, with a copy of the tokenizer: two threads cannot share one."""

    def __init__(self, settings: Settings) -> None:
        self._rule = settings.guidance
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmtok-guidance")
        self._tokenizer: Any = None

    async def of(self, texts: Sequence[str], tokenizer: Any) -> dict[str, list[int]]:
        """Returns the token ids of each distinct text."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._tokenize, texts, tokenizer)

    async def decode(self, ids: Sequence[int], tokenizer: Any) -> str:
        """Returns the text of token ids.

        Raises:
            ValueError: They are none of the model's (HTTP 400).
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._decode, ids, tokenizer)

    def _tokenize(self, texts: Sequence[str], tokenizer: Any) -> dict[str, list[int]]:
        copied = self._copy(tokenizer)
        return {text: _token_ids(copied, guidance_words(text, self._rule)) for text in dict.fromkeys(texts)}

    def _decode(self, ids: Sequence[int], tokenizer: Any) -> str:
        try:
            text: str = self._copy(tokenizer).decode(ids)
            return text
        except (TypeError, ValueError, OverflowError) as error:
            raise refusal("placeholders", f"input_ids are token ids of the model: {error!s:.200}") from error

    def _copy(self, tokenizer: Any) -> Any:
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(tokenizer)
        return self._tokenizer


def tokenizer_of(processor: Any) -> Any:
    """Returns the tokenizer of SGLang's processor."""
    return getattr(processor._processor, "tokenizer", processor._processor)


def _token_ids(tokenizer: Any, words: list[str]) -> list[int]:
    if not words:
        return []
    # Word by word, without BOS, as the authors tokenise: "_encode_text_with_token_pooling" in their mmtok_core.py.
    return list(tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"])
