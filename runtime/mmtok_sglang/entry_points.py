"""A request's `mm_processor_kwargs` at the entry points of SGLang that do not hand them on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from mmtok_sglang.refusals import refusal
from mmtok_sglang.request import FIELD, body_of

__all__ = ["engine_async_generate", "engine_generate", "generate_request"]

# What a call of `sgl.Engine` was given, until the engine makes its request of it.
_given_to_engine: ContextVar[Mapping[str, Any] | None] = ContextVar("mmtok_given_to_engine", default=None)


def generate_request(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Runs a request as SGLang does, with the `mm_processor_kwargs` that its caller sent.

    Args:
        original: An async generator of answers.
        manager: The tokenizer manager.
        obj: SGLang's request.
        request: The HTTP request that it was made of, None for `sgl.Engine`.
    """
    try:
        _hand_on(obj, request)
    except ValueError as error:
        return _refuse(error)
    return original(manager, obj, request)


def engine_generate(
    original: Callable[..., Any],
    engine: Any,
    *args: Any,
    mm_processor_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Generates as SGLang does; takes `mm_processor_kwargs` as well, one for all prompts."""
    with _given(mm_processor_kwargs):
        return original(engine, *args, **kwargs)


async def engine_async_generate(
    original: Callable[..., Any],
    engine: Any,
    *args: Any,
    mm_processor_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Generates as SGLang does; takes `mm_processor_kwargs` as well, one for all prompts."""
    with _given(mm_processor_kwargs):
        return await original(engine, *args, **kwargs)


@contextmanager
def _given(mm_processor_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
    before = _given_to_engine.set(mm_processor_kwargs)
    try:
        yield
    finally:
        _given_to_engine.reset(before)


def _hand_on(obj: Any, request: Any) -> None:
    if not obj.contains_mm_input():
        return
    body = body_of(request)
    if body is not None:
        _refuse_misplaced(body)
        given = body.get(FIELD)
    else:
        given = _given_to_engine.get()
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise refusal("field", f'{FIELD} is an object like {{"mmtok_budget": "10%"}}, got {given!r:.200}')
    ours = {name: value for name, value in given.items() if str(name).startswith("mmtok_") and value is not None}
    if not ours:
        return
    if not isinstance(obj, GenerateReqInput):
        raise refusal(
            "field",
            f"{FIELD}.{', '.join(sorted(ours))}: images of embedding requests have the server's own settings: send "
            "this to an endpoint that generates, or without the field",
        )
    # The guidance of a chat's messages is there already; the caller's own goes before it.
    obj.mm_processor_kwargs = {**(obj.mm_processor_kwargs or {}), **ours}


def _refuse_misplaced(body: Mapping[str, Any]) -> None:
    """Refuses the plugin's fields where SGLang would pass over them: the client would think that they were read."""
    names = _ours(body)
    if names:
        raise refusal(
            "field",
            f"{', '.join(names)} stands at the top of the request, where it is not read: send it as "
            f'{{"{FIELD}": {{"{names[0]}": ...}}}}',
        )
    extra = body.get("extra_body")
    if isinstance(extra, dict) and (FIELD in extra or _ours(extra)):
        raise refusal(
            "field",
            "extra_body is an argument of OpenAI's Python client, not a field of a request: send what is in it at the "
            f'top of the request, {{"{FIELD}": {{...}}}}',
        )
    for place, within in _parts(body):
        kwargs = within.get(FIELD)
        names = _ours(within) or (_ours(kwargs) if isinstance(kwargs, dict) else [])
        if names:
            raise refusal(
                "field",
                f"{', '.join(names)} stands within {place}, where it is not read: send it at the top of the request "
                f'(of /vertex_generate: in its parameters), as {{"{FIELD}": {{"{names[0]}": ...}}}}',
            )


def _ours(fields: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in fields if name.startswith("mmtok_"))


def _parts(body: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Gives the objects within a request that are of one prompt, message or image, and the field that they stand in."""
    for place in ("instances", "messages", "input", "sampling_params"):
        for each in _objects(body.get(place)):
            yield place, each
            for part in _objects(each.get("content")):
                yield place, part
                for image in _objects(part.get("image_url")):
                    yield place, image


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict)]


async def _refuse(error: ValueError) -> AsyncIterator[Any]:
    nothing: tuple[Any, ...] = ()
    for answer in nothing:
        yield answer  # an async generator, as the caller expects: it raises where SGLang's own refusals are raised
    raise error
