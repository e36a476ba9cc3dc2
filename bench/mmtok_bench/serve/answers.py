"""The check before anything is timed: at budget `all` a server answers as the one without the plugin does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmtok_bench.serve.load import photograph_url
from mmtok_bench.serve.presets import Size
from mmtok_bench.serve.questions import QUESTIONS
from mmtok_bench.server import SglangServer

__all__ = ["CheckedAnswer", "checked_answers", "first_difference"]

_MAX_TOKENS = 8
# In half precision one token's logprob may differ in its last bits where a batch is cut differently.
_LOGPROB_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class CheckedAnswer:
    """One greedy answer.

    Args:
        text: The answer.
        logprobs: Of each of its tokens.
        num_image_tokens: Tokens of the image in the prompt.
    """

    text: str
    logprobs: tuple[float, ...]
    num_image_tokens: int


def checked_answers(server: SglangServer, sizes_px: Sequence[Size]) -> list[CheckedAnswer]:
    """Returns a server's greedy answers about a photograph of each size.

    Raises:
        openai.OpenAIError: It refused a request or cannot be reached.
        ValueError: It sent no logprobs.
    """
    client = server.client()
    answers = []
    for number, size_px in enumerate(sizes_px):
        url = photograph_url(size_px, size_px, f"check {number}")
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
        ]
        completion = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
            max_tokens=_MAX_TOKENS,
            temperature=0,
            logprobs=True,
            extra_body={"ignore_eos": True},
        )
        choice = completion.choices[0]
        if choice.logprobs is None or not choice.logprobs.content or completion.usage is None:
            raise ValueError("expected logprobs and usage in the answer, got none: is this an SGLang server?")
        details = completion.usage.prompt_tokens_details
        answers.append(
            CheckedAnswer(
                choice.message.content or "",
                tuple(token.logprob for token in choice.logprobs.content),
                getattr(details, "image_tokens", None) or 0,
            )
        )
    return answers


def first_difference(without: Sequence[CheckedAnswer], with_all: Sequence[CheckedAnswer]) -> str | None:
    """Returns what tells two servers' answers apart, in words; None if nothing does."""
    for number, (left, right) in enumerate(zip(without, with_all, strict=True)):
        if left.text != right.text:
            return f"answer {number}: {left.text!r} without the plugin, {right.text!r} at budget all"
        if left.num_image_tokens != right.num_image_tokens:
            return f"answer {number}: {left.num_image_tokens} image tokens without, {right.num_image_tokens} at all"
        pairs = zip(left.logprobs, right.logprobs, strict=True)
        furthest = max((abs(one - other) for one, other in pairs), default=0.0)
        if furthest > _LOGPROB_TOLERANCE:
            return f"answer {number}: its logprobs differ by up to {furthest:.2g}, allowed are {_LOGPROB_TOLERANCE}"
    return None
