"""What one request asks for: its budget, and the text that guides the selection of each of its images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import MethodName
from mmtok_deploy.runtime.sglang.refusals import refusal
from mmtok_deploy.runtime.sglang.settings import Settings

__all__ = [
    "add_chat_guidance",
    "guidance_texts",
    "message_guidance",
    "prompt_guidance",
    "Requested",
    "requested",
]

_BUDGET, _GUIDANCE, _METHOD, _SEED = _FIELDS = ("mmtok_budget", "mmtok_guidance", "mmtok_method", "mmtok_seed")


@dataclass(frozen=True, slots=True)
class Requested:
    """How a request's images are to be pruned: as it says itself, else as the server says.

    Args:
        budget: Tokens that each keeps.
        method: What chooses them.
        seed: Of a method that draws; 0 for the others.
    """

    budget: Budget
    method: MethodName
    seed: int


# What SGLang puts the model's own placeholder in place of, after the plugin has read the prompt.
_ANY_IMAGE = "<image>"

# A user's turn in the prompts that the chat templates of the supported families render, up to the next role. The
# first pattern that a prompt has is its format: "USER:" may be a word of the text in another one.
_USER_TURNS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<\|im_start\|>user\n(.*?)(?:<\|im_end\|>|\Z)",  # ChatML: Qwen2.5-VL, LLaVA-NeXT 34B, 72B, 110B
        r"<\|start_header_id\|>user<\|end_header_id\|>(.*?)(?:<\|eot_id\|>|\Z)",  # Llama 3: LLaVA-NeXT
        r"\[INST\](.*?)(?:\[/INST\]|\Z)",  # Mistral: LLaVA-NeXT
        r"\bUSER:(.*?)(?:\bASSISTANT:|\Z)",  # Vicuna: LLaVA-1.5, LLaVA-NeXT
    )
]


def requested(kwargs: Mapping[str, Any] | None, settings: Settings) -> Requested:
    """Returns how a request is to be pruned.

    Args:
        kwargs: The request's `mm_processor_kwargs`.
        settings: The server's.

    Raises:
        ValueError: A field that does not exist, or a value that is not understood or cannot be served (HTTP 400).
    """
    budget, method = _budget(kwargs, settings.budget), _method(kwargs, settings)
    seed = _seed(kwargs, settings.seed)
    return Requested(budget, method, seed if method == "random" else 0)


def _budget(kwargs: Mapping[str, Any] | None, default: Budget) -> Budget:
    fields = kwargs or {}
    unknown = sorted(name for name in fields if name.startswith("mmtok_") and name not in _FIELDS)
    if unknown:
        raise refusal(
            "field", f"mm_processor_kwargs has no field {', '.join(unknown)}; a request may set {', '.join(_FIELDS)}"
        )
    if fields.get(_BUDGET) is None:
        return default
    try:
        return Budget.parse(fields[_BUDGET], minimum=default.minimum)
    except ValueError as error:
        raise refusal("field", f"mm_processor_kwargs.{_BUDGET}: {error}") from None


def _method(kwargs: Mapping[str, Any] | None, settings: Settings) -> MethodName:
    given = (kwargs or {}).get(_METHOD)
    try:
        return settings.method if given is None else settings.check_method(given)
    except ValueError as error:
        raise refusal("method", f"mm_processor_kwargs.{_METHOD}: {error}") from None


def _seed(kwargs: Mapping[str, Any] | None, default: int) -> int:
    given = (kwargs or {}).get(_SEED)
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise refusal("field", f"mm_processor_kwargs.{_SEED} is a whole number of at least 0, got {given!r:.200}")
    return given


def guidance_texts(
    kwargs: Mapping[str, Any] | None,
    prompt: str | Sequence[int],
    num_images: int,
    placeholder: str,
    decode: Callable[[Sequence[int]], str],
) -> list[str]:
    """Returns the guidance text of each image, in the order of the images in the prompt.

    Args:
        kwargs: The request's `mm_processor_kwargs`; its `mmtok_guidance`, one text for all images or a list of one
            an image, goes before the prompt. Chat requests carry the texts of their messages there.
        prompt: The prompt before placeholders are expanded, as text or token ids.
        num_images: Images in the prompt.
        placeholder: What stands for one image in the prompt's text.
        decode: Text of token ids.

    Raises:
        ValueError: `mmtok_guidance` is neither a text nor a list of one text an image (HTTP 400).
    """
    given = (kwargs or {}).get(_GUIDANCE)
    if isinstance(given, str):
        return [given] * num_images
    if given is not None:
        if isinstance(given, list) and len(given) == num_images and all(isinstance(text, str) for text in given):
            return given
        raise refusal(
            "field",
            f"mm_processor_kwargs.{_GUIDANCE} is one text, or a list of one text for each of the request's "
            f"{num_images} images, got {given!r:.200}",
        )
    text = prompt if isinstance(prompt, str) else decode(prompt)
    texts = prompt_guidance(text, placeholder) or prompt_guidance(text, _ANY_IMAGE)
    # A prompt of ids may come with its placeholders expanded: then every image is in the same text or none is told
    # apart, and the whole conversation's user text is the nearest to the rule.
    return texts if len(texts) == num_images else [" ".join(dict.fromkeys(texts))] * num_images


def prompt_guidance(prompt: str, placeholder: str) -> list[str]:
    """Returns, for each placeholder in a rendered prompt, the text of the user turn that it stands in.

    A prompt without known role markers is one turn.
    """
    texts: list[str] = []
    end = 0
    formats = ([(match.start(), match.end(), match[1]) for match in turn.finditer(prompt)] for turn in _USER_TURNS)
    for start, stop, turn in next(filter(None, formats), [(0, len(prompt), prompt)]):
        # Images between turns (in a system text, say) have the text around them as guidance.
        texts += _per_placeholder(prompt[end:start], placeholder) + _per_placeholder(turn, placeholder)
        end = stop
    return texts + _per_placeholder(prompt[end:], placeholder)


def message_guidance(messages: Sequence[Any]) -> list[str]:
    """Returns, for each image of a chat, the text of the turn that brought it.

    A turn is a run of messages of one role, so that an image and its question may come as two user messages.

    Args:
        messages: SGLang's chat messages, with `role` and `content` (a text, or a list of parts).
    """
    texts = []
    for _, turn in groupby(messages, key=lambda message: message.role):
        parts = [part for message in turn for part in _parts(message.content)]
        words = " ".join(text for kind, text in parts if kind == "text").strip()
        texts += [words] * sum(kind in ("image_url", "input_image") for kind, _ in parts)
    return texts


def add_chat_guidance(original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Converts a chat request as SGLang does, and hands the guidance texts on with it.

    Hooks: sglang 0.5.23 srt/entrypoints/openai/serving_chat.py OpenAIServingChat._convert_to_internal_request, the
    last place that sees messages. Can go when processors are given the messages.
    """
    adapted, request = original(serving, request, *args, **kwargs)
    images = adapted.image_data
    texts = message_guidance(request.messages) if images else []
    if texts and len(texts) == len(images):
        adapted.mm_processor_kwargs = {_GUIDANCE: texts} | (adapted.mm_processor_kwargs or {})
    return adapted, request


def _parts(content: Any) -> list[tuple[str, str]]:
    if content is None or isinstance(content, str):
        return [("text", content or "")]
    return [(part.type, getattr(part, "text", None) or "") for part in content]


def _per_placeholder(text: str, placeholder: str) -> list[str]:
    count = text.count(placeholder)
    # Markers around a placeholder (<|vision_start|>) are no words of the user's.
    words = re.sub(r"<\|[a-z_]+\|>", " ", text.replace(placeholder, " "))
    return [" ".join(words.split())] * count
