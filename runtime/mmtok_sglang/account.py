"""What was done with a request's images, as its answer says it: `meta_info["mmtok"]`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from mmtok_sglang.cache_key import keys_of
from mmtok_sglang.plan import plan_of
from mmtok_sglang.repeated_warnings import RepeatedWarning
from mmtok_sglang.selection import Outcome, TokenSelector

__all__ = ["accounting", "image_account", "is_sent_once", "remembered_by", "token_counts"]

logger = logging.getLogger(__name__)

_KEY = "mmtok"
_WRONG_COUNT = RepeatedWarning(logger)


def remembered_by(selector: TokenSelector) -> Callable[[Any], Outcome | None]:
    """Returns what looks up the outcome of an item's selection."""

    def outcome_of(item: Any) -> Outcome | None:
        keys = keys_of(item)
        return None if keys is None or keys.selection is None else selector.outcome(keys.selection)

    return outcome_of


def accounting(outcome_of: Callable[[Any], Outcome | None]) -> Callable[..., None]:
    """Returns what adds the account to a request's first output.

    Args:
        outcome_of: The outcome of an item's selection, without waiting for the device; None if it is not remembered.
    """
    reported_failure = False

    def accept(original: Callable[..., None], accumulator: Any, *, req: Any) -> None:
        nonlocal reported_failure
        try:
            # With its first token a request's images are through the encoder: what the device found is on the host.
            if req.multimodal_inputs is not None and req.output_ids and _KEY not in (req.customized_info or {}):
                account = image_account(req.multimodal_inputs.mm_items, outcome_of)
                req.customized_info = {**(req.customized_info or {}), _KEY: [account]}
        except Exception:
            # An answer without an account is better than no answer.
            if not reported_failure:
                logger.exception("MMTok: answers do not say what was done with their images")
            reported_failure = True
        original(accumulator, req=req)

    return accept


def is_sent_once(original: Callable[..., bool], streamer: Any, key: str) -> bool:
    """Returns whether SGLang sends a value of an answer's metadata once, and not one for each output token.

    Else a request of text has a null for each token that it generates beside one with images, and an answer of no
    tokens (`max_new_tokens` 0) has no account.
    """
    return key == _KEY or original(streamer, key)


def image_account(items: Any, outcome_of: Callable[[Any], Outcome | None]) -> dict[str, Any]:
    """Returns the account of a request's images and of its videos, each in the order of the prompt.

    Args:
        items: SGLang's items of the request.
        outcome_of: See `accounting`.
    """
    images = [_image(item, outcome_of) for item in items if item.is_image()]
    videos = [_image(item, outcome_of) for item in items if item.is_video()]
    fallbacks = [each["is_fallback"] for each in (*images, *videos)]
    return {
        "image_tokens_in": sum(image["tokens_in"] for image in images),
        "image_tokens_kept": sum(image["tokens_kept"] for image in images),
        "num_fallbacks": None if None in fallbacks else sum(fallbacks),
        "images": images,
        "video_tokens_in": sum(video["tokens_in"] for video in videos),
        "video_tokens_kept": sum(video["tokens_kept"] for video in videos),
        "videos": videos,
    }


def token_counts(original: Callable[..., tuple[int, int, int]], inputs: Any) -> tuple[int, int, int]:
    """Returns the tokens of a request's images, audio and videos; the text within a video's span is none of them.

    Args:
        original: SGLang's method, which counts spans.
        inputs: SGLang's inputs of the request.
    """
    images, audio, videos = original(inputs)
    try:
        text = sum(plan.num_between for plan in map(plan_of, inputs.mm_items) if plan is not None)
    except Exception as error:  # a wrong count is better than no answer, or no scheduler
        _WRONG_COUNT.log("MMTok: usage counts a video's timestamps among its tokens", error=error)
        text = 0
    return images, audio, videos - text


def _image(item: Any, outcome_of: Callable[[Any], Outcome | None]) -> dict[str, Any]:
    plan = plan_of(item)
    if plan is None:
        num_tokens = sum(end - start + 1 for start, end in item.offsets or ())
        return {
            "tokens_in": num_tokens,
            "tokens_encoded": num_tokens,
            "tokens_kept": num_tokens,
            "method": None,
            "coverage": None,
            "coverage_bound": None,
            "is_fallback": False,
            "auto": None,
        }
    outcome = outcome_of(item)
    return {
        "tokens_in": plan.num_tokens,
        "tokens_encoded": plan.num_encoded,
        "tokens_kept": plan.num_kept,
        "method": plan.method,
        "coverage": None if outcome is None else outcome.coverage,
        "coverage_bound": None if outcome is None else outcome.coverage_bound,
        "is_fallback": None if outcome is None else outcome.fallback is not None,
        "auto": plan.auto,
    }
