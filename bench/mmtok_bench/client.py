"""Asks an OpenAI-compatible server questions about images."""

from __future__ import annotations

import base64
import contextlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import openai
from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionUserMessageParam
from PIL import Image

__all__ = [
    "Answer",
    "MeasurementError",
    "RequestError",
    "ask",
    "image_url",
    "in_parallel",
    "openai_client",
    "stream",
    "user_message",
]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class MeasurementError(RuntimeError):
    """A measurement failed because of a server, a request or another program."""


class RequestError(MeasurementError):
    """A request failed; it counts neither as a right nor as a wrong answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer.

    Args:
        text: The generated text.
        ttft_ms: Milliseconds from sending the request to the first piece of text; to the end if nothing was streamed.
        latency_ms: Milliseconds from sending the request to the end of the answer.
        num_prompt_tokens: Tokens of the prompt, the image's included.
        num_image_tokens: Tokens of the image in the prompt; None if the server does not count them.
        num_cached_tokens: Prompt tokens taken from the server's prefix cache.
        logprobs: Logprobs of the answer's tokens, if they were requested.
        account: The plugin's report on the image, `meta_info["mmtok"]`, if it was requested and sent.
    """

    text: str
    ttft_ms: float
    latency_ms: float
    num_prompt_tokens: int
    num_image_tokens: int | None
    num_cached_tokens: int
    logprobs: tuple[float, ...] = ()
    account: Mapping[str, Any] | None = None


def openai_client(url: str) -> openai.OpenAI:
    """Returns an OpenAI client of the server at this address (without a path); it uses no proxy and does not retry."""
    return openai.OpenAI(
        base_url=f"{url.rstrip('/')}/v1",
        api_key="none",
        max_retries=0,
        timeout=300.0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


def ask(
    client: openai.OpenAI,
    image: str,
    question: str,
    *,
    max_tokens: int = 16,
    ignore_eos: bool = True,
    with_logprobs: bool = False,
    with_account: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> Answer:
    """Returns a server's greedy answer to a question about an image.

    The answer is streamed, unless its logprobs or the account are requested.

    Args:
        client: The client of a server started with `--enable-cache-report`; other servers count no image tokens.
        image: Result of `image_url`, or the address of an image.
        question: The user's text.
        max_tokens: Length of the answer.
        ignore_eos: Whether the answer goes on after an end token.
        with_logprobs: Whether to request the logprobs of the answer's tokens.
        with_account: Whether to request `Answer.account`; SGLang sends no `meta_info` with a stream.
        fields: Further fields of the request's body, such as `mm_processor_kwargs`.

    Raises:
        RequestError: The server refused the request, cannot be reached, or sent no text, usage or logprobs.
    """
    fields = {"ignore_eos": ignore_eos, **(fields or {})}
    if not (with_logprobs or with_account):
        *_, streamed = stream(client, image, question, max_tokens=max_tokens, fields=fields)
        assert isinstance(streamed, Answer)
        return streamed
    started_s = time.perf_counter()
    # In a stream, SGLang 0.5.23 leaves out the logprobs of tokens that are not a whole character.
    with _told_failure(question, fields):
        told = {"return_meta_info": True} if with_account else {}
        answered = _create(client, image, question, max_tokens, fields | told)(logprobs=with_logprobs)
    latency_s = time.perf_counter() - started_s
    choice = answered.choices[0]
    found = choice.logprobs
    logprobs = tuple(token.logprob for token in (found.content if found else None) or ())
    if with_logprobs and not logprobs:
        raise _lacks(question, "logprobs")
    answer = _answer(question, choice.message.content, answered.usage, latency_s, latency_s)
    # A list of one object.
    accounts = (getattr(choice, "meta_info", None) or {}).get("mmtok")
    return replace(answer, logprobs=logprobs, account=dict(accounts[0]) if accounts else None)


def stream(
    client: openai.OpenAI, image: str, question: str, *, max_tokens: int = 16, fields: Mapping[str, Any] | None = None
) -> Iterator[str | Answer]:
    """Yields the pieces of a server's greedy answer as they arrive, then the whole `Answer`; arguments as in `ask`.

    Raises:
        RequestError: The server refused the request, cannot be reached, or sent no text or usage.
    """
    text: str | None = None
    usage, ttft_s = None, None
    started_s = time.perf_counter()
    with _told_failure(question, fields):
        create = _create(client, image, question, max_tokens, fields)
        for chunk in create(stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece and ttft_s is None:
                ttft_s = time.perf_counter() - started_s
            if piece is not None:
                text = (text or "") + piece
            if piece:
                yield piece
    latency_s = time.perf_counter() - started_s
    yield _answer(question, text, usage, latency_s if ttft_s is None else ttft_s, latency_s)


def _create(
    client: openai.OpenAI, image: str, question: str, max_tokens: int, fields: Mapping[str, Any] | None
) -> Callable[..., Any]:
    return partial(
        client.chat.completions.create,
        model="default",
        messages=[user_message([image], question)],
        max_tokens=max_tokens,
        temperature=0,
        extra_body=dict(fields or {}),
    )


@contextlib.contextmanager
def _told_failure(question: str, fields: Mapping[str, Any] | None) -> Iterator[None]:
    try:
        yield
    except openai.OpenAIError as error:
        raise RequestError(f"{question!r} with {fields} failed: {error}") from error


def _lacks(question: str, what: str) -> RequestError:
    return RequestError(f"{question!r} came back without {what}: is this an SGLang server?")


def _answer(question: str, text: str | None, usage: Any, ttft_s: float, latency_s: float) -> Answer:
    if text is None or usage is None:
        raise _lacks(question, "text" if text is None else "usage")
    details = usage.prompt_tokens_details
    # A field of SGLang's, which the OpenAI client does not declare.
    num_image_tokens = getattr(details, "image_tokens", None)
    return Answer(
        text=text,
        ttft_ms=1000 * ttft_s,
        latency_ms=1000 * latency_s,
        num_prompt_tokens=usage.prompt_tokens,
        num_image_tokens=num_image_tokens if isinstance(num_image_tokens, int) else None,
        num_cached_tokens=(details.cached_tokens or 0) if details else 0,
    )


def user_message(images: Iterable[str], question: str) -> ChatCompletionUserMessageParam:
    """Returns a user message: images by URL, then the question."""
    content: list[ChatCompletionContentPartParam] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def in_parallel(num_threads: int, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Returns the result of `work` for each item; `num_threads` run at a time, started in order.

    The first error, or Ctrl-C, is raised at once: calls that have not started are dropped, and running calls are not
    waited for. These end when their server is stopped.
    """
    pool = ThreadPoolExecutor(num_threads)
    try:
        results = [done.result() for done in [pool.submit(work, item) for item in items]]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return results


def image_url(image: Image.Image, *, lossless: bool = True) -> str:
    """Returns a data URL with the image as a PNG, which keeps every pixel, or as a JPEG, which cameras send."""
    file = io.BytesIO()
    kind, options = ("png", {}) if lossless else ("jpeg", {"quality": 90})
    image.save(file, format=kind.upper(), **options)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
