"""Many questions at once to a server, through the official OpenAI client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import openai
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessageParam

from mmtok_bench.pocket.questions import Question
from mmtok_bench.quality.scoring import normalise

__all__ = ["Asker", "Request", "RequestError", "Said"]

_TIMEOUT_S = 300.0


class RequestError(RuntimeError):
    """A request that failed: it is neither a right nor a wrong answer."""


@dataclass(frozen=True, slots=True)
class Request:
    """A question about an image, with the fields that say how the image is pruned.

    Args:
        image_url: A data URL.
        question: What is asked, and how long the answer may be.
        fields: SGLang's `mm_processor_kwargs`; empty leaves the server's own.
    """

    image_url: str
    question: Question
    fields: dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Said:
    """An answer.

    Args:
        text: As generated.
        num_prompt_tokens: The image's included.
        num_image_tokens: Those that the language model read; None where the server does not count them.
        latency_ms: From sending the request to the answer, others running beside it.
    """

    text: str
    num_prompt_tokens: int
    num_image_tokens: int | None
    latency_ms: float


class Asker:
    """A client of one server; used in an `async with` block.

    Args:
        url: The server's address, without a path.
        num_at_once: Requests under way at a time.
        max_tokens: Length of an answer; None allows the words of the question's right answer.
    """

    def __init__(self, url: str, *, num_at_once: int, max_tokens: int | None = None) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=f"{url.rstrip('/')}/v1",
            api_key="none",
            max_retries=0,
            timeout=_TIMEOUT_S,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )
        self._num_at_once = num_at_once
        self._max_tokens = max_tokens

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask_all(self, requests: Sequence[Request], on_answer: Callable[[], None]) -> list[Said]:
        """Returns the answers in the order of the requests, which are sent in that order too.

        Raises:
            RequestError: The first request that failed; the others are given up.
        """
        waiting = iter(enumerate(requests))
        said: list[Said | None] = [None] * len(requests)

        async def work() -> None:
            for number, request in waiting:
                said[number] = await self._ask(request)
                on_answer()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._num_at_once, len(requests))):
                    group.create_task(work())
        except* RequestError as errors:
            raise errors.exceptions[0] from None
        return [answer for answer in said if answer is not None]

    async def _ask(self, request: Request) -> Said:
        messages: list[ChatCompletionMessageParam] = [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": request.image_url}},
                    {"type": "text", "text": request.question.text},
                ],
            }
        ]
        body: dict[str, Any] = {"mm_processor_kwargs": request.fields} if request.fields else {}
        started_s = time.perf_counter()
        try:
            answer = await self._client.chat.completions.create(
                model="default",
                messages=messages,
                max_tokens=self._max_tokens or len(normalise(request.question.answer).split()),
                temperature=0,
                extra_body=body,
            )
        except openai.OpenAIError as error:
            raise RequestError(f"{request.question.text!r} with {request.fields} failed: {error}") from error
        if answer.usage is None or not answer.choices or answer.choices[0].message.content is None:
            raise RequestError(f"{request.question.text!r} came back without text or usage: is this an SGLang server?")
        return Said(
            answer.choices[0].message.content,
            answer.usage.prompt_tokens,
            _num_image_tokens(answer.usage),
            1000 * (time.perf_counter() - started_s),
        )


def _num_image_tokens(usage: CompletionUsage) -> int | None:
    # SGLang's own field, there with --enable-cache-report.
    number = getattr(usage.prompt_tokens_details, "image_tokens", None)
    return number if isinstance(number, int) else None
