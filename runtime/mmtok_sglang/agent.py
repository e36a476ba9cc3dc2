"""--mmtok-agent-url: a small model answers first, and its answer joins the text that guides the selection.

Whatever the agent does or sends, the request goes on with the question alone.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from sglang.srt.utils import ImageData, load_image

from mmtok_sglang.agent_address import AgentAddress
from mmtok_sglang.flush_count import FlushCount, make_flush_count
from mmtok_sglang.metrics import collectors
from mmtok_sglang.refusals import refusal
from mmtok_sglang.repeated_warnings import RepeatedWarning

__all__ = ["Agent", "refuse_chains"]

logger = logging.getLogger(__name__)

# What guides are a few words; a model that goes on and on would drown the question.
_MAX_ANSWER_TOKENS = 32
_MAX_ANSWER_LETTERS = 256
# An answer of 32 tokens, with whatever a server says beside it, takes a few KB.
_MAX_BODY_BYTES = 64 << 10
# Answers remembered: a conversation's later turns bring the same image and text, and must be guided alike.
_MAX_REMEMBERED = 4096
_MAX_CALLS = 32
"""Calls under way in one tokenizer process; more wait for one of these to end, within their own time limit."""
_FAILURES_TO_OPEN = 5
"""Failures one after another, after which the agent is not asked for a while."""
_OPEN_S = 30.0

_HEADER = "X-MMTok-Agent"
"""What every question carries, so that a server that has an agent itself refuses it: no chain, and no loop."""


class _AgentError(Exception):
    """An answer that is none.

    Args:
        why: What came; it may hold what the agent sent.
        is_of_request: Whether it says nothing about the next question.
    """

    def __init__(self, why: str, *, is_of_request: bool = False) -> None:
        super().__init__(why)
        self.is_of_request = is_of_request


class Agent:
    """Asks a small vision-language model; one a tokenizer process, on its event loop.

    Args:
        url: An OpenAI-compatible endpoint, up to and with its `/v1`.
        model: Its name there.
        timeout_ms: After which the question alone guides.
        flush_count: The path of the number of flushes that all tokenizer processes of the server raise; None where
            this is the one process.
        now_s: The time, for tests.

    Source: MMTok, arXiv 2508.18264, the agent that enriches the text; answers drawn greedily.
    """

    def __init__(
        self,
        url: str,
        model: str,
        timeout_ms: int,
        flush_count: str | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = AgentAddress(url)
        self._model = model
        self._timeout_s = timeout_ms / 1000
        self._answers: OrderedDict[bytes, str] = OrderedDict()
        self._flushes = FlushCount(flush_count or make_flush_count())
        self._num_flushes = 0
        self._calls = asyncio.Semaphore(_MAX_CALLS)
        self._breaker = _Breaker(now_s)
        self._warnings = {name: RepeatedWarning(logger) for name in ("agent_errors", "agent_timeouts", "agent_skips")}

    async def join(self, images: Sequence[Any] | None, texts: Sequence[str], wanted: Sequence[bool]) -> list[str]:
        """Returns each image's text with the agent's answer to it after it, or as it was.

        Images of one text are asked about together, different texts side by side, and all within the time limit.

        Args:
            images: What SGLang can load, in the order of the prompt.
            texts: One an image; without words there is nothing to ask.
            wanted: Whether the image is to be pruned; others are not sent.
        """
        num_images = len(images or ())
        if num_images != len(texts):
            self._count("agent_errors", f"{num_images} images came for {len(texts)} in the prompt")
            return list(texts)
        asked: dict[str, list[Any]] = {}
        for image, text, want in zip(images or (), texts, wanted, strict=True):
            if want and text.strip():
                asked.setdefault(text, []).append(image)
        found = await asyncio.gather(*(self._answer(text, group) for text, group in asked.items()))
        answers = dict(zip(asked, found, strict=True))
        return [
            f"{text} {answers[text]}".strip() if want and answers.get(text) else text
            for text, want in zip(texts, wanted, strict=True)
        ]

    def clear(self) -> None:
        """Forgets every answer, in each of the server's tokenizer processes: SGLang has flushed its caches."""
        self._flushes.add()

    def _forget_flushed(self) -> int:
        """Forgets what was answered before the last flush, and returns how many there were."""
        num_flushes = int(self._flushes)
        if num_flushes != self._num_flushes:
            self._answers.clear()
            self._num_flushes = num_flushes
        return num_flushes

    async def _answer(self, text: str, images: Sequence[Any]) -> str:
        """Returns the agent's answer, "" if there is none."""
        start_s = time.perf_counter()
        is_asked, is_failure, answer = False, None, ""
        try:
            num_flushes = self._forget_flushed()
            async with asyncio.timeout(self._timeout_s):
                # Images are read and encoded off the event loop.
                key, body = await asyncio.to_thread(self._question, text, images)
                if key in self._answers:
                    self._answers.move_to_end(key)
                    return self._answers[key]
                if not self._breaker.may_ask():
                    self._count("agent_skips", f"it failed {_FAILURES_TO_OPEN} times, and is asked again after a while")
                    return ""
                is_asked = True
                async with self._calls:
                    answer = await self._ask(body)
            is_failure = False
            self._remember(key, answer, num_flushes)
        except TimeoutError:
            is_failure = True
            self._count("agent_timeouts", f"no answer within {self._timeout_s:g} s")
        # Also what reading an image or a library may raise that is not foreseen: the request must not end by it.
        except Exception as error:
            is_failure = None if isinstance(error, _AgentError) and error.is_of_request else True
            self._count("agent_errors", str(error) if isinstance(error, _AgentError) else _said_by(error))
        finally:
            # Also of a call whose client has gone, which says nothing about the agent.
            if is_asked:
                self._breaker.end(is_failure=is_failure)
        collectors()["agent_milliseconds"].observe((time.perf_counter() - start_s) * 1000)
        return answer

    def _remember(self, key: bytes, answer: str, num_flushes: int) -> None:
        if num_flushes != self._forget_flushed():
            return  # asked before a flush
        self._answers[key] = answer
        if len(self._answers) > _MAX_REMEMBERED:
            self._answers.popitem(last=False)

    def _question(self, text: str, images: Sequence[Any]) -> tuple[bytes, bytes]:
        """Returns what a question is remembered by, and the body of the request that asks it."""
        parts = [{"type": "image_url", "image_url": {"url": _image_url(image)}} for image in images]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "max_tokens": _MAX_ANSWER_TOKENS,
            "temperature": 0,
        }
        # JSON tells where each image and the text end.
        sent = json.dumps(body).encode()
        return hashlib.sha256(sent).digest(), sent

    async def _ask(self, body: bytes) -> str:
        # Nothing is unpacked: a few KB could become GB.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", _HEADER: "1"}
        # A session a question: a connection costs nothing beside an answer, and belongs to no event loop for long.
        no_limit = aiohttp.ClientTimeout(total=None)  # of its own: the caller's holds
        async with (
            aiohttp.ClientSession(
                timeout=no_limit, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            ) as session,
            session.post(self._address.completions, data=body, headers=headers, allow_redirects=False) as response,
        ):
            if response.status != 200:
                said = (await response.content.read(200)).decode(errors="replace")
                # It says nothing about the agent's health: a picture that it does not take, a text too long for it.
                is_of_request = response.status in (400, 413, 415, 422)
                where = " and a redirect, which is not followed" if 300 <= response.status < 400 else ""
                raise _AgentError(f"HTTP {response.status}{where}: {said!r}", is_of_request=is_of_request)
            encoding = response.headers.get("Content-Encoding", "identity").lower()
            if encoding != "identity":
                raise _AgentError(f"an answer packed by {encoding!r:.40}, asked for was identity")
            received = bytearray()
            async for part in response.content.iter_chunked(4096):
                received += part
                if len(received) > _MAX_BODY_BYTES:
                    raise _AgentError(f"an answer of more than {_MAX_BODY_BYTES} bytes")
        return _text_of(bytes(received))

    def _count(self, counter: str, why: str) -> None:
        collectors()[counter].inc()
        self._warnings[counter].log(
            "MMTok: the question alone guides, the agent at %s gave nothing (%s)",
            self._address.shown,
            self._address.hide(why),
        )


class _Breaker:
    """Says whether the agent is asked: not for a while after failures one after another, then once, to see.

    Args:
        now_s: The time.
    """

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._num_failures = 0
        self._closed_from_s = float("-inf")
        self._is_trying = False

    def may_ask(self) -> bool:
        """True if the agent is to be asked now; `end` must follow."""
        if self._num_failures < _FAILURES_TO_OPEN:
            return True
        if self._is_trying or self._now_s() < self._closed_from_s:
            return False
        self._is_trying = True
        return True

    def end(self, *, is_failure: bool | None) -> None:
        """Takes a call's outcome; None says nothing about the agent."""
        self._is_trying = False
        if is_failure is None:
            return
        self._num_failures = self._num_failures + 1 if is_failure else 0
        if self._num_failures >= _FAILURES_TO_OPEN:
            self._closed_from_s = self._now_s() + _OPEN_S


def refuse_chains(around: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the hook on a chat request of a server with an agent: it refuses what another server's agent is asked."""

    def convert(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any = None) -> Any:
        if raw_request is not None and raw_request.headers.get(_HEADER) is not None:
            raise refusal(
                "agent",
                "this server has an agent of its own (--mmtok-agent-url) and answers no question that is for an agent: "
                "let --mmtok-agent-url name a server without one",
            )
        return around(original, serving, request, raw_request)

    return convert


def _text_of(received: bytes) -> str:
    """Returns the text of a chat completion."""
    try:
        found = json.loads(received)
        content = found["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _AgentError(f"no chat completion: {received[:200].decode(errors='replace')!r}") from None
    # Brackets within brackets by the thousand are a RecursionError, numbers of thousands of digits a ValueError.
    except (ValueError, RecursionError) as error:
        raise _AgentError(f"no JSON: {_said_by(error)}") from None
    if not isinstance(content, str | None):
        raise _AgentError(f"no chat completion: its content is a {type(content).__name__}, expected a text")
    # Half a surrogate pair is valid JSON and no text that can be tokenised.
    text = (content or "").encode(errors="replace").decode()
    return text.strip()[:_MAX_ANSWER_LETTERS]


def _said_by(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]!r}"


def _image_url(image: Any) -> str:
    """Returns an address that the agent's server can read: the request's own, or the image itself."""
    if isinstance(image, ImageData):
        image = image.url
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return image
    loaded, _ = load_image(image, False)
    buffer = io.BytesIO()
    loaded.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
