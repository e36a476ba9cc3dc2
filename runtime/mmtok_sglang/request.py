"""What one request asks for: its budget, and the text that guides the selection of each of its images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from mmtok_deploy.auto_budget import AutoBudget, parse_budget
from mmtok_deploy.budget import Budget
from mmtok_deploy.config import KeySource
from mmtok_deploy.methods import MethodName, reads_question
from mmtok_deploy.shown import shown
from mmtok_sglang.refusals import refusal
from mmtok_sglang.settings import (
    MAX_SEED,
    Settings,
    VideoBudget,
    check_budget,
    check_encoder_scale,
    check_frame_method,
    check_skip_repeats,
    check_video_budget,
)

__all__ = [
    "FIELD",
    "add_chat_guidance",
    "body_of",
    "check_messages",
    "guidance_texts",
    "is_ours",
    "message_guidance",
    "prompt_guidance",
    "Requested",
    "requested",
]

_FIELDS = (
    *("mmtok_budget", "mmtok_encoder_scale", "mmtok_guidance", "mmtok_keys", "mmtok_method", "mmtok_seed"),
    *("mmtok_skip_repeats", "mmtok_video_budget"),
)
_BUDGET, _ENCODER_SCALE, _GUIDANCE, _KEYS, _METHOD, _SEED, _SKIP_REPEATS, _VIDEO_BUDGET = _FIELDS


@dataclass(frozen=True, slots=True)
class Requested:
    """How a request's images are to be pruned: as it says itself, else as the server says.

    Args:
        budget: Tokens that each keeps, of those that it has at its scale.
        method: What chooses them.
        seed: What a method that draws is seeded with; 0 for the others.
        encoder_scale: What each of its sides is scaled by before the vision encoder.
        video_budget: What shares a video's budget.
        keys: The side of the projector by whose features tokens are compared; "input" for a method that compares none.
        skip_repeats: The largest difference of pixels by which a token repeats its neighbour and is not encoded; -1 has
            all tokens encoded.
    """

    budget: Budget | AutoBudget
    method: MethodName
    seed: int
    encoder_scale: float = 1.0
    video_budget: VideoBudget = "video"
    keys: KeySource = "input"
    skip_repeats: int = -1

    @property
    def prunes_images(self) -> bool:
        """True if tokens of images may be left out."""
        return not self.budget.is_all or self.skip_repeats >= 0

    @property
    def changes_nothing(self) -> bool:
        """True if images are read whole and as they came."""
        return not self.prunes_images and self.encoder_scale == 1


FIELD = "mm_processor_kwargs"
"""The field of a request that holds all of ours."""

_MEDIA_PARTS = ("image_url", "input_image", "video_url")

# What SGLang puts the model's own placeholder in place of, after the plugin has read the prompt.
_ANY_IMAGE = "<image>"

# A user's turn in the prompts that the chat templates of the supported families render, up to the next role. The
# first pattern that a prompt has is its format: "USER:" may be a word of the text in another one.
_USER_TURNS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<\|im_start\|>user\n(.*?)(?:<\|im_end\|>|\Z)",  # ChatML: Qwens, LLaVA-NeXT 34B, 72B, 110B
        r"<\|user\|>\n(.*?)(?:/nothink)?(?=<\|(?:system|user|assistant|observation)\|>|\Z)",  # GLM
        r"<\|start_header_id\|>user<\|end_header_id\|>(.*?)(?:<\|eot_id\|>|\Z)",  # Llama 3: LLaVA-NeXT
        r"\[INST\](.*?)(?:\[/INST\]|\Z)",  # Mistral: LLaVA-NeXT
        r"\bUSER:(.*?)(?:\bASSISTANT:|\Z)",  # Vicuna: LLaVA-1.5, LLaVA-NeXT
    )
]
_TOOL_RESULT, _TOOL_RESULT_END = "<tool_response>", "</tool_response>"


def requested(kwargs: Mapping[str, Any] | None, settings: Settings) -> Requested:
    """Returns how a request is to be pruned.

    Args:
        kwargs: The request's `mm_processor_kwargs`.
        settings: The server's.

    Raises:
        ValueError: A field that does not exist, or a value that is not understood or cannot be served (HTTP 400).
    """
    budget, method = _budget(kwargs, settings), _method(kwargs, settings)
    _checked(check_budget, budget, method)
    seed = _seed(kwargs, settings.seed)
    video_budget = _checked(check_video_budget, _given(kwargs, _VIDEO_BUDGET, settings.video_budget))
    _checked(check_frame_method, method, video_budget, kind="method")
    return Requested(
        *(budget, method, seed if method == "random" else 0),
        _checked(check_encoder_scale, _given(kwargs, _ENCODER_SCALE, settings.encoder_scale), method),
        video_budget,
        _checked(settings.check_keys, _given(kwargs, _KEYS, settings.keys), method),
        _checked(check_skip_repeats, _given(kwargs, _SKIP_REPEATS, settings.skip_repeats), method),
    )


def _given(kwargs: Mapping[str, Any] | None, field: str, default: Any) -> Any:
    """Returns the request's value of a field, the server's if it has none."""
    value = (kwargs or {}).get(field)
    return default if value is None else value


def _checked(check: Callable[..., Any], *values: Any, kind: Literal["field", "method"] = "field") -> Any:
    """Returns `check(*values)`.

    Raises:
        ValueError: The check's, as a refusal that names the request's field (HTTP 400).
    """
    try:
        return check(*values)
    except ValueError as error:
        raise refusal(kind, f"mm_processor_kwargs.mmtok_{error}") from None


def is_ours(name: object) -> bool:
    """True for the name of a field that is meant for the plugin, however it is written: mmtok-budget, MMTOK_BUDGET."""
    return str(name).lower().startswith("mmtok")


def _budget(kwargs: Mapping[str, Any] | None, settings: Settings) -> Budget | AutoBudget:
    fields = kwargs or {}
    unknown = sorted(name for name in fields if is_ours(name) and name not in _FIELDS)
    if unknown:
        raise refusal(
            "field", f"mm_processor_kwargs has no field {', '.join(unknown)}; a request may set {', '.join(_FIELDS)}"
        )
    if fields.get(_BUDGET) is None:
        return settings.budget
    try:
        return parse_budget(fields[_BUDGET], settings.auto, minimum=settings.budget.minimum)
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
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= MAX_SEED:
        raise refusal(
            "field", f"mm_processor_kwargs.{_SEED} is a whole number from 0 to {MAX_SEED}, got {shown(given)}"
        )
    return given


def guidance_texts(
    kwargs: Mapping[str, Any] | None,
    prompt: str,
    num_images: int,
    *placeholders: str,
) -> list[str]:
    """Returns the guidance text of each image and video, in their order in the prompt.

    Args:
        kwargs: The request's `mm_processor_kwargs`; its `mmtok_guidance`, one text for all images or a list of one
            an image, goes before the prompt. Chat requests carry the texts of their messages there.
        prompt: The prompt as text, before placeholders are expanded.
        num_images: Images and videos in the prompt.
        placeholders: What stands for one image, or one video, in the prompt's text.

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
            f"{num_images} images and videos, got {shown(given)}",
        )
    texts = prompt_guidance(prompt, *placeholders)
    if len(texts) != num_images:
        texts = prompt_guidance(prompt, _ANY_IMAGE, *placeholders) or texts
    # A prompt of ids may come with its placeholders expanded: then every image is in the same text or none is told
    # apart, and the whole conversation's user text is the nearest to the rule.
    return texts if len(texts) == num_images else [" ".join(dict.fromkeys(texts))] * num_images


def prompt_guidance(prompt: str, *placeholders: str) -> list[str]:
    """Returns, for each placeholder in a rendered prompt, the text of the user turn that it stands in.

    Elsewhere (in a system text or a tool's result) it has the text of the nearest user turn before it, else of the
    first after it. A prompt without known role markers is one turn.
    """
    pieces: list[_Piece] = []
    end = 0
    formats = ([(match.start(), match.end(), match[1]) for match in turn.finditer(prompt)] for turn in _USER_TURNS)
    for turn, (start, stop, text) in enumerate(next(filter(None, formats), [(0, len(prompt), prompt)])):
        pieces.append(_piece(None, prompt[end:start], placeholders))
        # Templates without a role of tools render their results as parts of a user's turn.
        for index, part in enumerate(_split_at_tool_results(text)):
            pieces.append(_piece(None if index % 2 else turn, part, placeholders))
        end = stop
    return _texts_of_images([*pieces, _piece(None, prompt[end:], placeholders)])


def _split_at_tool_results(text: str) -> list[str]:
    """Returns the text before the first tool's result, that result, the text after it, and so on."""
    # Not by a regular expression: each begin without an end would search the whole text.
    parts: list[str] = []
    end = 0
    while (start := text.find(_TOOL_RESULT, end)) >= 0 and (stop := text.find(_TOOL_RESULT_END, start)) >= 0:
        parts += [text[end:start], text[start + len(_TOOL_RESULT) : stop]]
        end = stop + len(_TOOL_RESULT_END)
    return [*parts, text[end:]]


def message_guidance(messages: Sequence[Any]) -> list[str]:
    """Returns, for each image and video of a chat, the text of the user turn that brought it.

    A turn is a run of user messages, so that an image and its question may come as two. An image of another role (a
    system message, a tool's result) has the text of the nearest user turn before it, else of the first after it: a
    later turn of the conversation does not change that, and so keeps the selection and the prefix cache.

    Args:
        messages: SGLang's chat messages, with `role` and `content` (a text, or a list of parts).
    """
    pieces = []
    for turn, (role, group) in enumerate(groupby(messages, key=lambda message: message.role)):
        parts = [part for message in group for part in _parts(message.content)]
        words = " ".join(text for kind, text in parts if kind == "text").strip()
        num_images = sum(kind in _MEDIA_PARTS for kind, _ in parts)
        pieces.append(_Piece(turn if role == "user" else None, words, num_images))
    return _texts_of_images(pieces)


class _Piece(NamedTuple):
    """A piece of a conversation: the user turn that it is in (None for another role), its words, images and videos."""

    turn: int | None
    words: str
    num_images: int


def _piece(turn: int | None, text: str, placeholders: Sequence[str]) -> _Piece:
    words = text
    for placeholder in placeholders:
        words = words.replace(placeholder, " ")
    # Markers around a placeholder (<|vision_start|>) and names of roles are no words of the user's.
    words = re.sub(r"<\|im_start\|>\w+|<\|[a-z_]+\|>", " ", words)
    return _Piece(turn, " ".join(words.split()), sum(map(text.count, placeholders)))


def _texts_of_images(pieces: Sequence[_Piece]) -> list[str]:
    words_of: dict[int, list[str]] = {}
    for turn, words, _ in pieces:
        if turn is not None:
            words_of.setdefault(turn, []).append(words)
    said = {turn: " ".join(filter(None, each)) for turn, each in words_of.items()}
    first, last = next(filter(None, said.values()), ""), ""
    texts: list[str] = []
    for turn, words, num_images in pieces:
        if turn is not None and words:
            last = said[turn]
        texts += [said[turn] if turn is not None else last or first or words] * num_images
    return texts


def check_messages(
    settings: Settings, original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Renders and tokenises a chat's messages as SGLang does; images beside too long a text are refused before.

    All that a template may render is counted: definitions and calls of tools, and what a model has thought, too.

    While SGLang tokenises 10 MB of text, no other thread of the process runs for more than a second.

    Raises:
        ValueError: A text that is longer than any prompt of the server (HTTP 400).
    """
    if _num_media(request.messages):
        num_letters = _num_letters(request.messages, request.tools, request.chat_template_kwargs)
        settings.limits.check_prompt(num_letters, "characters", serving.tokenizer_manager.max_req_input_len)
    return original(serving, request, *args, **kwargs)


def add_chat_guidance(
    settings: Settings, original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None
) -> Any:
    """Converts a chat request as SGLang does, and hands the guidance texts on with it.

    Raises:
        ValueError: A text that is too long to guide, before SGLang tokenises it (HTTP 400).
    """
    if _num_media(request.messages):
        _check_guidance(settings, request, raw_request)
    adapted, request = original(serving, request, raw_request)
    num_media = len(adapted.image_data or ()) + len(adapted.video_data or ())
    texts = message_guidance(request.messages) if num_media else []
    if texts and len(texts) == num_media:
        given = adapted.mm_processor_kwargs or {}
        if given.get(_GUIDANCE) is None:
            adapted.mm_processor_kwargs = {**given, _GUIDANCE: texts}
    return adapted, request


def _check_guidance(settings: Settings, request: Any, raw_request: Any) -> None:
    # /v1/messages makes a chat of its request that lacks the field.
    kwargs = (body_of(raw_request) or {}).get(FIELD) or request.mm_processor_kwargs
    if not isinstance(kwargs, Mapping | None):
        return  # refused where the field is read
    asked = requested(kwargs, settings)
    given = (kwargs or {}).get(_GUIDANCE)
    if given is not None or asked.budget.is_all or not reads_question(asked.method):
        return
    settings.limits.check_texts(message_guidance(request.messages))


def body_of(raw_request: Any) -> dict[str, Any] | None:
    """Returns the JSON object that an HTTP request brought, None if it brought none or is none."""
    # FastAPI has parsed it already, and Starlette keeps it here: reading it again would cost time.
    body = getattr(raw_request, "_json", None)
    return body if isinstance(body, dict) else None


def _num_letters(*values: Any) -> int:
    """Returns the letters of all texts in a chat's parts; those of images and videos are none."""
    num_letters = 0
    # No recursion: a tool's schema may be nested as deep as JSON allows.
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            num_letters += len(value)
        elif isinstance(value, Mapping):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, BaseModel) and getattr(value, "type", None) not in _MEDIA_PARTS:
            pending += [each for name, each in vars(value).items() if name not in ("role", "type")]
    return num_letters


def _num_media(messages: Sequence[Any]) -> int:
    return sum(kind in _MEDIA_PARTS for message in messages for kind, _ in _parts(message.content))


def _parts(content: Any) -> list[tuple[str, str]]:
    if content is None or isinstance(content, str):
        return [("text", content or "")]
    return [(part.type, getattr(part, "text", None) or "") for part in content]
