"""--mmtok-agent-url: a small model answers first, and its answer joins the text that guides the selection."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import aiohttp
from sglang.srt.utils import ImageData, load_image

from mmtok_deploy.runtime.sglang.metrics import collectors

__all__ = ["Agent"]

logger = logging.getLogger(__name__)

# What guides are a few words; a model that goes on and on would drown the question.
_MAX_ANSWER_TOKENS = 32
_MAX_ANSWER_LETTERS = 256
# Answers remembered: a conversation's later turns bring the same image and text, and must be guided alike.
_MAX_REMEMBERED = 4096


class Agent:
    """Asks a small vision-language model; one a tokenizer process, on its event loop.

    Args:
        url: Of an OpenAI-compatible endpoint, up to and with its `/v1`.
        model: Its name there.
        timeout_ms: After which the question alone guides.

    Source: MMTok, arXiv 2508.18264, the agent that enriches the text; answers drawn greedily.
    """

    def __init__(self, url: str, model: str, timeout_ms: int) -> None:
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model
        self._timeout_s = timeout_ms / 1000
        self._answers: OrderedDict[bytes, str] = OrderedDict()

    async def join(self, images: Sequence[Any], texts: Sequence[str], wanted: Sequence[bool]) -> list[str]:
        """Returns each image's text with the agent's answer to it after it, or as it was.

        Images of one text are asked about together, different texts side by side, and all within the time limit.

        Args:
            images: What SGLang can load, in the order of the prompt.
            texts: One an image; without words there is nothing to ask.
            wanted: Whether the image is to be pruned; others are not sent.
        """
        if len(images) != len(texts):
            self._count("agent_errors", f"{len(images)} images came for {len(texts)} in the prompt")
            return list(texts)
        asked: dict[str, list[Any]] = {}
        for image, text, want in zip(images, texts, wanted, strict=True):
            if want and text.strip():
                asked.setdefault(text, []).append(image)
        found = await asyncio.gather(*(self._answer(text, group) for text, group in asked.items()))
        answers = dict(zip(asked, found, strict=True))
        return [
            f"{text} {answers[text]}".strip() if want and answers.get(text) else text
            for text, want in zip(texts, wanted, strict=True)
        ]

    async def _answer(self, text: str, images: Sequence[Any]) -> str:
        """Returns the agent's answer, "" if there is none."""
        start_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                # Images are read and encoded off the event loop.
                urls = [await asyncio.to_thread(_image_url, image) for image in images]
                key = hashlib.sha256("\n".join([*urls, text]).encode()).digest()
                if key in self._answers:
                    self._answers.move_to_end(key)
                    return self._answers[key]
                answer = await self._ask(text, urls)
        except TimeoutError:
            self._count("agent_timeouts", f"no answer within {self._timeout_s:g} s")
            answer = ""
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._count("agent_errors", f"{type(error).__name__}: {error}")
            answer = ""
        else:
            self._answers[key] = answer
            if len(self._answers) > _MAX_REMEMBERED:
                self._answers.popitem(last=False)
        collectors()["agent_milliseconds"].observe((time.perf_counter() - start_s) * 1000)
        return answer

    async def _ask(self, text: str, urls: Sequence[str]) -> str:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "max_tokens": _MAX_ANSWER_TOKENS,
            "temperature": 0,
        }
        # A session a question: a connection costs nothing beside an answer, and belongs to no event loop for long.
        no_limit = aiohttp.ClientTimeout(total=None)  # of its own: the caller's holds
        async with (
            aiohttp.ClientSession(timeout=no_limit) as session,
            session.post(self._url, json=body) as response,
        ):
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}: {(await response.text())[:200]}")
            found = await response.json()
        try:
            return str(found["choices"][0]["message"]["content"] or "").strip()[:_MAX_ANSWER_LETTERS]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"no chat completion: {str(found)[:200]}") from None

    def _count(self, counter: str, why: str) -> None:
        collectors()[counter].inc()
        logger.warning("MMTok: the question alone guides, the agent at %s gave nothing (%s)", self._url, why)


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
