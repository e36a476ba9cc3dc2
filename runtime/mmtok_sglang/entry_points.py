"""A request's `mm_processor_kwargs` at the entry points of SGLang that do not hand them on."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.responses import JSONResponse

from mmtok_deploy.shown import shown
from mmtok_sglang.refusals import refusal
from mmtok_sglang.request import FIELD, body_of, is_ours

__all__ = ["answer_http", "engine_async_generate", "engine_generate", "generate_request"]

# What a call of `sgl.Engine` was given, until the engine makes its request of it.
_given_to_engine: ContextVar[Mapping[str, Any] | None] = ContextVar("mmtok_given_to_engine", default=None)

# Fields whose values have names of the caller's: schemas, arguments of tools, and what a processor of logits is given.
_OF_THE_CALLER = {
    *("tools", "functions", "tool_calls", "function_call", "arguments"),
    *("response_format", "format", "json_schema", "metadata", "custom_params"),
}

_UNEXPECTED = re.compile(rf"[Uu]nexpected keyword argument '(mmtok_\w+|{FIELD}|extra_body)'")


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


async def answer_http(
    original: Callable[..., Awaitable[None]], middleware: Any, scope: Any, receive: Any, send: Any
) -> None:
    """Answers an HTTP request as SGLang does; HTTP 400 where it fails for one of the plugin's fields.

    What /vertex_generate has in its `parameters`, and any endpoint in its `sampling_params`, are arguments of a call.
    """
    has_begun = False

    async def send_on(message: Any) -> None:
        nonlocal has_begun
        has_begun = True
        await send(message)

    try:
        await original(middleware, scope, receive, send_on)
    except TypeError as error:
        found = _UNEXPECTED.search(str(error))
        if found is None or has_begun:
            raise
        message = str(
            refusal(
                "field",
                f"{found[1]} stands where it is not read: send {FIELD} at the top of the request (of /vertex_generate: "
                f'in its parameters), as {{"{FIELD}": {{"mmtok_budget": ...}}}}',
            )
        )
        await JSONResponse({"error": {"message": message}}, 400)(scope, receive, send)


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
    # SGLang looks at what /generate is sent, and not at what /vertex_generate is.
    for each in (given, getattr(obj, FIELD, None)):
        if each is not None and not isinstance(each, Mapping):
            raise refusal("field", f'{FIELD} is an object like {{"mmtok_budget": "10%"}}, got {shown(each)}')
    if given is None:
        return
    ours = {name: value for name, value in given.items() if is_ours(name) and value is not None}
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
    for place, within in _objects(body):
        names = _ours(within)
        if names:
            raise refusal(
                "field",
                f"{', '.join(names)} stands within {place}, where it is not read: send it at the top of the request "
                f'(of /vertex_generate: in its parameters), as {{"{FIELD}": {{"{names[0]}": ...}}}}',
            )


def _ours(fields: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in fields if is_ours(name))


def _objects(body: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Gives the objects within a request, at any depth, and the field that each stands in; none of the caller's own."""
    fields = _within_ours(body)
    parameters = fields.get("parameters")
    if "instances" in body and isinstance(parameters, dict):
        fields["parameters"] = _within_ours(parameters)
    # No recursion: it may be nested as deep as JSON allows.
    pending = [(place, value) for place, value in fields.items() if place not in _OF_THE_CALLER]
    while pending:
        place, value = pending.pop()
        if isinstance(value, list):
            pending += [(place, each) for each in value if isinstance(each, dict | list)]
        elif isinstance(value, dict) and value.get("type") != "tool_use":
            yield place, value
            pending += [(place, each) for name, each in value.items() if name not in _OF_THE_CALLER]


def _within_ours(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields with, in place of the one that holds ours, what stands within each of ours."""
    within = {name: value for name, value in fields.items() if name != FIELD}
    ours = fields.get(FIELD)
    if isinstance(ours, Mapping):
        within |= {f"{FIELD}.{name}": value for name, value in ours.items()}
    return within


async def _refuse(error: ValueError) -> AsyncIterator[Any]:
    nothing: tuple[Any, ...] = ()
    for answer in nothing:
        yield answer  # an async generator, as the caller expects: it raises where SGLang's own refusals are raised
    raise error
