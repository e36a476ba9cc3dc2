"""Chats as the tests write them, for the server and for the judge."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image

from mmtok_deploy.photographs import photograph
from tests.runtime.films import Film

__all__ = ["CHATS", "QUESTION", "Chat", "Part", "data_url", "small"]

Part = str | Image.Image | Film


@cache
def small(name: str, width: int = 336, height: int = 252) -> Image.Image:
    """Returns a photograph at a size that keeps the tests quick."""
    return photograph(name).resize((width, height))


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Chat:
    """Messages of text, images and films: (role, parts)."""

    turns: tuple[tuple[str, tuple[Part, ...]], ...]

    @classmethod
    def ask(cls, *parts: Part) -> Chat:
        return cls((("user", parts),))

    def then(self, role: str, *parts: Part) -> Chat:
        return Chat((*self.turns, (role, parts)))

    @property
    def images(self) -> list[Image.Image]:
        return [part for _, parts in self.turns for part in parts if isinstance(part, Image.Image)]

    @property
    def films(self) -> list[Film]:
        return [part for _, parts in self.turns for part in parts if isinstance(part, Film)]

    @property
    def guidance(self) -> list[str]:
        """The text of the turn that brought each image or film."""
        return [
            " ".join(text for text in parts if isinstance(text, str))
            for _, parts in self.turns
            for part in parts
            if not isinstance(part, str)
        ]

    def for_server(self) -> list[dict[str, Any]]:
        return self._messages(
            lambda part: (
                {"type": "video_url", "video_url": {"url": part.url}}
                if isinstance(part, Film)
                else {"type": "image_url", "image_url": {"url": data_url(part)}}
            )
        )

    def for_template(self) -> list[dict[str, Any]]:
        return self._messages(lambda part: {"type": "video" if isinstance(part, Film) else "image"})

    def _messages(self, media_part: Any) -> list[dict[str, Any]]:
        return [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else media_part(part) for part in parts
                ],
            }
            for role, parts in self.turns
        ]


QUESTION = "How many cats are on the red table?"
CHATS = (
    Chat.ask(small("coffee"), QUESTION),
    Chat.ask(small("chelsea"), small("coffee"), QUESTION),
    Chat.ask("No image."),
    # Behind the prefix that the first chat leaves.
    Chat.ask(small("coffee"), QUESTION).then("assistant", "None.").then("user", "Why?"),
)
"""One image, two, none, and a chat that goes on."""
