"""What a request is refused for that brings something else than images and videos that can be pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from sglang.srt.managers.io_struct import EmbeddingReqInput
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

from mmtok_sglang.plan import KEY
from mmtok_sglang.refusals import refusal
from mmtok_sglang.request import Requested

__all__ = [
    "advice",
    "drop_our_names",
    "refuse_features",
    "refuse_no_media",
    "refuse_our_names",
    "refuse_scattered_placeholders",
    "videos_of",
]


def videos_of(request: Any) -> list[Any]:
    """Returns the videos that a request brings."""
    videos = getattr(request, "video_data", None) or []
    return videos if isinstance(videos, list) else [videos]


def advice(request: Any, asked: Requested) -> str:
    """Returns what to send to have a request read unpruned."""
    if isinstance(request, EmbeddingReqInput):  # which has no such field
        return "embed it on a server without --mmtok-budget"
    unscaled = "" if asked.encoder_scale == 1 else ', "mmtok_encoder_scale": 1'
    unskipped = "" if asked.skip_repeats < 0 else ', "mmtok_skip_repeats": -1'
    return f'send mm_processor_kwargs={{"mmtok_budget": "all"{unscaled}{unskipped}}} to have it read unpruned'


def refuse_features(request: Any, image_data: Any, asked: Requested) -> None:
    """Raises ValueError (HTTP 400) for images that come ready-made."""
    if any(isinstance(image, dict) for image in image_data or []):
        raise refusal(
            "features",
            "MMTok prunes raw images, this request brings precomputed embeddings or features: "
            f"{advice(request, asked)}",
        )


def refuse_no_media(kind: Literal["image", "video"], media: Sequence[Any] | None) -> None:
    """Raises ValueError (HTTP 400) for what JSON may have in an image's or a video's place.

    SGLang may load an address from within an image's, and Hugging Face's processor an address or a path within a list
    in a video's, which no limit would have seen.
    """
    expected = f"{'an image' if kind == 'image' else 'a video'} is an address, a path or base64 text"
    for each in media or []:
        if isinstance(each, dict) and not BaseMultimodalProcessor._is_preprocessed_input(each):
            raise refusal(
                kind,
                f"{expected}, got an object of {', '.join(map(str, each))}: send the text itself, "
                f'"{kind}_data": "https://..." and not {{"url": "https://..."}}',
            )
        is_bad_list = isinstance(each, list | tuple) and (kind == "image" or _has_text(each))
        if each is None or isinstance(each, bool | int | float) or is_bad_list:
            raise refusal(
                kind,
                f"{expected}, got a {type(each).__name__}: send one list of {kind}s for a prompt, and a list of such "
                "lists for a list of prompts",
            )


def _has_text(value: Sequence[Any]) -> bool:
    """True for a list with a text at any depth; rows of numbers are not walked."""
    pending: list[Any] = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, str | bytes):
            return True
        if isinstance(each, list | tuple) and each and not isinstance(each[0], int | float):
            pending.extend(each)
    return False


def refuse_our_names(*sources: Any) -> None:
    """Raises ValueError (HTTP 400) for input that brings what only the plugin writes: a plan could be another's."""
    for source in sources:
        for each in source if isinstance(source, list | tuple) else [source]:
            if not isinstance(each, dict):
                continue
            nested = each.get("model_specific_data")
            names = [*each, *(nested if isinstance(nested, dict) else ())]
            ours = sorted({name for name in names if isinstance(name, str) and name.startswith(KEY)})
            if ours:
                raise refusal(
                    "features",
                    f"features that come ready-made have {', '.join(ours)}, which MMTok alone sets: leave it out",
                )


def drop_our_names(item: Any) -> None:
    """Takes off SGLang's item what only the plugin writes."""
    for name in [name for name in item.model_specific_data if str(name).startswith(KEY)]:
        del item.model_specific_data[name]


def refuse_scattered_placeholders(items: Sequence[Any], num_runs: Callable[[Any], int]) -> None:
    """Raises ValueError (HTTP 400) for an image whose placeholders are not as many runs as its family writes.

    Args:
        items: SGLang's.
        num_runs: Returns the runs of an item.
    """
    for item in items:
        found, expected = len(item.offsets or ()), num_runs(item)
        if found != expected:
            what = "image has one run" if expected == 1 else f"video of {expected} steps in time has as many runs"
            raise refusal(
                "placeholders",
                f"each {what} of placeholders in the prompt, one here has {found}: write one placeholder for each "
                "image or video",
            )
