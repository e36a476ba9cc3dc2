"""Twenty chats whose logprobs must be the same before and after every fault."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from mmtok_bench.client import image_url, user_message
from mmtok_bench.families import FamilyName
from mmtok_bench.server import SglangServer
from mmtok_deploy.photographs import PHOTOGRAPHS, photograph

__all__ = [
    "TOLERANCE",
    "Account",
    "ask_for_logprobs",
    "ask_fixed_chats",
    "chat_body",
    "largest_difference",
    "small_image",
]

TOLERANCE = 5e-6
"""The largest difference of logprobs from the hand-pruned model, in float32, that was seen in the tests."""

Account = list[dict[str, float]]
"""For each generated token, the logprobs of the most probable tokens; the chosen one is first."""

_NUM_CHATS = 20
_QUESTIONS = ("What is in this cup?", "How many cats are on the red table?", "Which colours are there?", "Is it dark?")
_FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"mmtok_budget": "50%"},
    {"mmtok_budget": 7},
    {"mmtok_budget": "all"},
    {"mmtok_method": "divprune"},
    {"mmtok_method": "random", "mmtok_seed": 3},
    {"mmtok_guidance": "a cat and a rocket"},
)


@cache
def small_image(name: str, width: int = 224, height: int = 168) -> str:
    """Returns a photograph as a data URL, at a size that a CPU reads quickly."""
    return image_url(photograph(name).resize((width, height)))


def chat_body(parts: list[str], question: str, fields: dict[str, Any], *, max_tokens: int = 4) -> dict[str, Any]:
    """Returns the body of a greedy chat about images (data URLs or addresses) that asks for logprobs."""
    return {
        "model": "default",
        "messages": [user_message(parts, question)],
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
        "ignore_eos": True,
        "mm_processor_kwargs": fields or None,
    }


def ask_for_logprobs(server: SglangServer, body: dict[str, Any], *, timeout_s: float = 120.0) -> Account:
    """Returns the logprobs of a server's answer to `chat_body`.

    Raises:
        openai.OpenAIError: The server refused the request or cannot be reached.
    """
    known = {
        name: body[name] for name in ("model", "messages", "max_tokens", "temperature", "logprobs", "top_logprobs")
    }
    extra = {name: value for name, value in body.items() if name not in known}
    with server.client() as client:
        completion = client.chat.completions.create(**known, extra_body=extra, timeout=timeout_s)
    logprobs = completion.choices[0].logprobs
    account = []
    for token in (logprobs.content if logprobs else None) or ():
        top = {other.token: other.logprob for other in token.top_logprobs}
        account.append({token.token: token.logprob} | top)
    return account


def ask_fixed_chats(server: SglangServer, family: FamilyName) -> list[Account]:
    """Returns the logprobs of the twenty chats, asked one after another."""
    return [ask_for_logprobs(server, body) for body in _bodies(family)]


@cache
def _bodies(family: FamilyName) -> list[dict[str, Any]]:
    names = list(PHOTOGRAPHS)
    bodies = []
    for number in range(_NUM_CHATS):
        images = [small_image(names[number % len(names)])]
        if number % 6 == 5 and family != "llava-next":
            images.append(small_image(names[(number + 1) % len(names)], 168, 224))
        question = _QUESTIONS[number % len(_QUESTIONS)]
        bodies.append(chat_body(images if number else [], question, _FIELDS[number % len(_FIELDS)]))
    return bodies


def largest_difference(before: list[Account], after: list[Account]) -> float:
    """Returns the largest difference of a logprob; infinite if another token was chosen and not by rounding.

    Tokens that only one side lists are at the end of its list of the most probable ones, and are not compared.
    """
    largest = 0.0
    for one, other in zip(before, after, strict=True):
        if len(one) != len(other):
            return math.inf
        for these, those in zip(one, other, strict=True):
            if next(iter(these)) not in those:
                return math.inf
            largest = max(largest, *(abs(these[token] - those[token]) for token in these.keys() & those.keys()))
            if next(iter(these)) != next(iter(those)):
                # A tie within rounding: from here on, the texts differ.
                break
    return largest
