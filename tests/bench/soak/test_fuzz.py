from __future__ import annotations

import json
from pathlib import Path

from mmtok_soak.fuzz import ENDPOINTS, fuzzed_body
from mmtok_soak.trial import Trial


def trial(seed: int = 0) -> Trial:
    return Trial("qwen2.5-vl", Path("unused"), seed=seed)


def test_a_number_is_the_same_body_every_time_and_another_for_another_seed() -> None:
    bodies = [fuzzed_body(trial(), number) for number in range(200)]
    assert bodies == [fuzzed_body(trial(), number) for number in range(200)]
    others = [fuzzed_body(trial(seed=1), number) for number in range(200)]
    assert sum(one != other for one, other in zip(bodies, others, strict=True)) > 150


def test_endpoints_take_turns() -> None:
    assert [fuzzed_body(trial(), number)[0] for number in range(4)] == list(ENDPOINTS)


def test_bodies_are_of_many_kinds() -> None:
    bodies = [fuzzed_body(trial(), number)[1] for number in range(400)]
    num_json = 0
    for body in bodies:
        try:
            json.loads(body)
            num_json += 1
        except (ValueError, RecursionError):
            pass
    assert 300 < num_json < 400
    fields = (b"mmtok_budget", b"mmtok_guidance", b"mmtok_keys")
    for mark in (*fields, b"<|image_pad|>", b"precomputed_embedding", b"NaN", b"\\ud800"):
        assert sum(mark in body for body in bodies) > 2, mark


def test_no_valid_body_asks_for_a_long_answer() -> None:
    """A few whose bytes were changed may: their fields have other names then."""
    num_long = 0
    for number in range(600):
        path, text = fuzzed_body(trial(), number)
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            continue
        limits = body.get("sampling_params") if path == "/generate" else body
        if not isinstance(limits, dict) or limits.get("max_new_tokens", limits.get("max_tokens")) != 2:
            num_long += 1
    assert num_long < 12
