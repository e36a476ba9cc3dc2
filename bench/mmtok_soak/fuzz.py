"""Fuzzed request bodies: each must be answered by 2xx or 4xx, and the server must stay alive."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any, get_args

from mmtok_bench.client import in_parallel
from mmtok_bench.families import FAMILY_TRAITS, FamilyName
from mmtok_bench.server import SglangServer
from mmtok_deploy.config import KeySource
from mmtok_deploy.methods import MethodName
from mmtok_soak.fixed_chats import small_image
from mmtok_soak.trial import Trial, send

__all__ = ["ENDPOINTS", "fuzz", "fuzzed_body"]

_PARALLEL = 8
_TIMEOUT_S = 60.0
# These fields are not changed: SGLang itself would work for minutes, or sample at random.
_FIXED_FIELDS = ("max_tokens", "sampling_params", "max_new_tokens", "temperature", "n", "stream", "model")
_KWARGS = "mm_processor_kwargs"
_OUR_FIELDS = (
    *("mmtok_budget", "mmtok_encoder_scale", "mmtok_guidance", "mmtok_keys", "mmtok_method", "mmtok_seed"),
    *("mmtok_skip_repeats", "mmtok_bugdet", "mmtok", "images_kwargs"),
)
_METHODS = (*get_args(MethodName), "")


def _coffee() -> str:
    return small_image("coffee", 112, 84)


def _prompt(family: FamilyName) -> str:
    return f"USER: {FAMILY_TRAITS[family].placeholder} What is it? ASSISTANT:"


def _chat(family: FamilyName) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": _coffee()}}, {"type": "text", "text": "What is in this cup?"}]
    return {
        "model": "default",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 2,
        "temperature": 0,
        _KWARGS: {"mmtok_budget": "25%"},
    }


def _generate(family: FamilyName) -> dict[str, Any]:
    return {
        "text": _prompt(family),
        "image_data": [_coffee()],
        "sampling_params": {"max_new_tokens": 2, "temperature": 0},
        _KWARGS: {"mmtok_budget": "25%"},
    }


def _completion(family: FamilyName) -> dict[str, Any]:
    return {
        "model": "default",
        "prompt": _prompt(family),
        "max_tokens": 2,
        "temperature": 0,
        _KWARGS: {"mmtok_budget": "25%"},
    }


def _message(family: FamilyName) -> dict[str, Any]:
    data = _coffee().partition(",")[2]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    return {
        "model": "default",
        "max_tokens": 2,
        "messages": [
            {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]}
        ],
        _KWARGS: {"mmtok_budget": "25%"},
    }


ENDPOINTS: dict[str, Callable[[FamilyName], dict[str, Any]]] = {
    "/v1/chat/completions": _chat,
    "/generate": _generate,
    "/v1/completions": _completion,
    "/v1/messages": _message,
}


def fuzz(trial: Trial, server: SglangServer, num_bodies: int) -> list[int]:
    """Sends fuzzed bodies, eight at a time, and returns the numbers of the bodies that were answered by 5xx.

    Args:
        trial: Counts and reports.
        server: The server that they are sent to.
        num_bodies: How many, to the four endpoints in turn.
    """
    failed: list[int] = []

    def one(number: int) -> None:
        if trial.is_over() or not server.is_alive():
            return
        if number % 500 == 499:
            trial.step(f"{number + 1} of {num_bodies} bodies")
        path, body = fuzzed_body(trial, number)
        trial.count("bodies")
        reply = trial.send(server, path, body, timeout_s=_TIMEOUT_S)
        if reply.status == 0:
            said = f"{reply.status} {reply.text[:200]}"
            trial.fail(f"{path}: a body was not answered", f"{_reproduction(trial, number, path, body)} -> {said}")
        elif reply.status >= 500:
            failed.append(number)

    in_parallel(_PARALLEL, one, range(num_bodies))
    return sorted(failed)


def judge_failed(trial: Trial, plain: SglangServer, numbers: list[int]) -> None:
    """Reports the bodies that a server with a budget answers by 5xx and one without the plugin does not."""
    for number in numbers:
        path, body = fuzzed_body(trial, number)
        own = send(plain, path, _without_our_fields(body), timeout_s=_TIMEOUT_S)
        if own.status >= 500 or own.status == 0:
            trial.count("answers_5xx_of_sglang_alone")
        else:
            kind = f"{path}: 5xx where SGLang alone answers {own.status // 100}xx"
            trial.fail(kind, _reproduction(trial, number, path, body))


def _without_our_fields(body: bytes) -> bytes:
    """Returns the body without the plugin's fields; a body that is no JSON object is returned unchanged."""
    try:
        values = json.loads(body)
        kwargs = values[_KWARGS]
        values[_KWARGS] = {name: value for name, value in kwargs.items() if not name.startswith("mmtok_")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return body
    return json.dumps(values).encode(errors="surrogatepass")


def _reproduction(trial: Trial, number: int, path: str, body: bytes) -> str:
    text = body.decode(errors="replace")
    for image in (_coffee(), _coffee().partition(",")[2]):
        text = text.replace(image, "IMAGE")
    return f"seed {trial.seed} family {trial.family} number {number} {path} {text[:600]}"


def fuzzed_body(trial: Trial, number: int) -> tuple[str, bytes]:
    """Returns the endpoint and the body of a number, which depend only on seed and family."""
    draw = trial.random("fuzz", number)
    path = list(ENDPOINTS)[number % len(ENDPOINTS)]
    body = ENDPOINTS[path](trial.family)
    kind = draw.random()
    if kind < 0.45:
        _fuzz_our_fields(draw, body)
    elif kind < 0.6:
        _fuzz_texts(draw, body, FAMILY_TRAITS[trial.family].placeholder)
    elif kind < 0.9:
        for _ in range(draw.choice((1, 1, 2, 4))):
            _change_a_node(draw, body)
    text = json.dumps(body)
    if kind >= 0.9:
        text = _change_letters(draw, text)
    return path, text.encode(errors="surrogatepass")


def _fuzz_our_fields(draw: random.Random, body: dict[str, Any]) -> None:
    fields = {name: _value(draw) for name in draw.sample(_OUR_FIELDS, draw.randint(1, 3))}
    if draw.random() < 0.5:
        fields["mmtok_method"] = draw.choice(_METHODS)
    if draw.random() < 0.5:
        fields["mmtok_budget"] = draw.choice(
            ("10%", 0.5, 1, 3, "all", 10**9, "0.01%", "100%", 1e-9, "1e400", "-0", "auto")
        )
    if draw.random() < 0.3:
        fields["mmtok_keys"] = draw.choice((*get_args(KeySource), "Output", ""))
    body[_KWARGS] = fields if draw.random() < 0.9 else _value(draw)


def _fuzz_texts(draw: random.Random, body: dict[str, Any], placeholder: str) -> None:
    marks = ("<image>", "<|vision_start|>", "<|im_start|>user\n", "USER:", "[INST]", "\0", "\ud800", "ß" * 99)
    pieces = (placeholder, *marks)
    text = "".join(draw.choice((*pieces, "what ", "is ", "it ")) for _ in range(draw.randint(1, 8)))
    for holder, key in _nodes(body):
        is_text = key in ("text", "prompt", "mmtok_guidance")
        if is_text and isinstance(holder[key], str):
            holder[key] = text
    if draw.random() < 0.3:
        body[_KWARGS] = {"mmtok_guidance": text}


def _change_a_node(draw: random.Random, body: dict[str, Any]) -> None:
    nodes = [(holder, key) for holder, key in _nodes(body) if key not in _FIXED_FIELDS]
    if not nodes:
        return
    holder, key = draw.choice(nodes)
    action = draw.random()
    if action < 0.5:
        holder[key] = _value(draw)
    elif action < 0.7:
        del holder[key]
    elif action < 0.85 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    else:
        holder[key] = [holder[key]] if draw.random() < 0.5 else {"mmtok": holder[key]}


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(pairs):
        found += [(value, key), *_nodes(part)]
    return found


def _value(draw: random.Random, depth: int = 0) -> Any:
    """Returns a random JSON value."""
    kind = draw.randrange(11 if depth < 3 else 9)
    match kind:
        case 0:
            return None
        case 1:
            return draw.random() < 0.5
        case 2:
            return draw.choice((0, 1, -1, 2**31, 2**63, -(2**64), 10**30, 57))
        case 3:
            return draw.choice((0.0, 1.0, 0.1, -0.5, 1e308, 1e-320, float("nan"), float("inf")))
        case 4:
            return draw.choice(
                (
                    *("", "10%", "all", "a" * 3000, "\0", "ß", "½%", "\uff11\uff10%"),
                    *("data:image/png;base64,AAAA", "/etc/hostname"),
                )
            )
        case 5:
            return _coffee()
        case 6:
            return "".join(chr(draw.randrange(1, 0xD000)) for _ in range(draw.randint(1, 20)))
        case 7:
            return ["a", "b"] * draw.randint(0, 3)
        case 8:
            return {"format": "precomputed_embedding", "feature": [[0.0]], "mmtok": {"num_kept": 1}}
        case 9:
            return [_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        case _:
            return {draw.choice(("mmtok", "url", "text", "type", "a")): _value(draw, depth + 1) for _ in range(2)}


def _change_letters(draw: random.Random, text: str) -> str:
    letters = list(text)
    match draw.randrange(4):
        case 0:
            return text[: draw.randrange(len(text))]
        case 1:
            for _ in range(draw.randint(1, 8)):
                letters[draw.randrange(len(letters))] = chr(draw.randrange(32, 127))
        case 2:
            place = draw.randrange(len(letters))
            letters[place:place] = draw.choice(('{"a":', "[" * 5000, "null", "\\ud800", "\0"))
        case _:
            del letters[draw.randrange(len(letters)) : draw.randrange(len(letters))]
    return "".join(letters)
