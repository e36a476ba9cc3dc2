"""One streamed question about an image, as any client of an OpenAI-compatible server asks it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import openai
from PIL import Image

__all__ = ["Answer", "ask", "image_url"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Args:
        text: The generated text.
        ttft_ms: Milliseconds from sending the request to the first piece of text.
        num_prompt_tokens: Tokens of the prompt, the image's included.
        num_image_tokens: Tokens of the image in the prompt.
        num_cached_tokens: Prompt tokens taken from the server's prefix cache.
    """

    text: str
    ttft_ms: float
    num_prompt_tokens: int
    num_image_tokens: int
    num_cached_tokens: int


def ask(
    client: openai.OpenAI,
    image: str,
    question: str,
    *,
    max_tokens: int = 16,
    ignore_eos: bool = True,
    fields: Mapping[str, Any] | None = None,
) -> Answer:
    """Returns a server's greedy answer to a question about an image.

    Args:
        client: Of a server started with `--enable-cache-report`, without which it does not count cached tokens.
        image: What `image_url` returns, or the address of an image.
        question: The user's text.
        max_tokens: Length of the answer.
        ignore_eos: Whether it is not ended before by an end token.
        fields: Further ones of the request's body, as `mm_processor_kwargs`.

    Raises:
        ValueError: The server reported no usage, or sent no text.
        openai.OpenAIError: It refused the request or cannot be reached.
    """
    started_s = time.perf_counter()
    stream = client.chat.completions.create(
        model="default",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": ignore_eos, **(fields or {})},
    )
    pieces, ttft_ms, usage = [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            if ttft_ms is None:
                ttft_ms = 1000 * (time.perf_counter() - started_s)
            pieces.append(piece)
    if usage is None or ttft_ms is None:
        missing = "usage" if usage is None else "text"
        raise ValueError(f"expected text and usage in the stream, got no {missing}: is this an SGLang server?")
    details = usage.prompt_tokens_details
    return Answer(
        text="".join(pieces),
        ttft_ms=ttft_ms,
        num_prompt_tokens=usage.prompt_tokens,
        # SGLang's own field, which the OpenAI client passes on without a declaration.
        num_image_tokens=getattr(details, "image_tokens", None) or 0,
        num_cached_tokens=(details.cached_tokens or 0) if details else 0,
    )


def image_url(image: Image.Image) -> str:
    """Returns a data URL with the image as a PNG, which keeps every pixel as it is."""
    png = io.BytesIO()
    image.save(png, format="PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
