"""Requests that the plugin refuses: one place makes their errors, and counts them by kind."""

from __future__ import annotations

from typing import Literal

from mmtok_sglang.metrics import collectors
from mmtok_sglang.ranks import is_first_rank

__all__ = ["Kind", "count_refusal", "refusal", "token_ids_refusal"]

Kind = Literal[
    "field",
    "method",
    "video",
    "features",
    "image",
    "hashes",
    "num_images",
    "pixels",
    "aspect_ratio",
    "placeholders",
    "guidance",
    "selection_cost",
    "engine",
    "downsample",
    "positions",
    "agent",
]
"""The label of `mmtok:refused_requests_total`, a row each in docs/inside-a-server.md."""

_MAX_LETTERS = 1000


def refusal(kind: Kind, message: object) -> ValueError:
    """Returns the error to raise for a request that is refused, and counts the refusal.

    In the tokenizer process SGLang answers HTTP 400 to a ValueError, with its message.

    Args:
        kind: What it is counted under.
        message: What was expected, what came, and what to do.
    """
    count_refusal(kind)
    # What the request brought may be half of a surrogate pair, which no answer can be sent with.
    text = str(message).encode(errors="backslashreplace").decode()
    # It may show what the request brought, of any length.
    if len(text) > _MAX_LETTERS:
        text = f"{text[: _MAX_LETTERS // 2]} [...] {text[-_MAX_LETTERS // 2 :]}"
    return ValueError(text)


def token_ids_refusal() -> ValueError:
    """Returns the error to raise for images with a prompt of token ids, where the processor expands placeholders."""
    return refusal(
        "placeholders", "this model takes a prompt with images as text, which a processor expands: send no input_ids"
    )


def count_refusal(kind: Kind) -> None:
    """Counts a refusal that is no exception: the scheduler ends a request by a message."""
    if is_first_rank():
        collectors()["refused_requests"].labels(kind).inc()
