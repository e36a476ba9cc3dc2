"""Refusing prompts whose placeholders are not those of their images, before SGLang's processor meets them.

A text may hold what stands for an image (`what is <|image_pad|> ?`). Beside an image, the processor takes it for
another image: Qwen2.5-VL's never answers then, and LLaVA's fails.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmtok_sglang.refusals import refusal

__all__ = ["PlaceholderRule"]


@dataclass(frozen=True, slots=True)
class PlaceholderRule:
    """What a model family's processor takes for an image in a prompt.

    Args:
        image: Matches what stands for one image.
        reserved: Tokens that stand nowhere else.
        video: Matches what stands for one video; None where placeholders of videos are not looked at.
    """

    image: re.Pattern[str]
    reserved: Sequence[str] = ()
    video: re.Pattern[str] | None = None

    def check(self, prompt: str, num_images: int, num_videos: int = 0) -> None:
        """Raises ValueError (HTTP 400) unless each image and video has its placeholder and there is no other.

        Args:
            prompt: Before placeholders are expanded.
            num_images: Images that came with it.
            num_videos: Videos that did.
        """
        rest = _without(self.image, "image", num_images, prompt)
        if self.video is None and num_videos:
            return  # whose placeholders have the reserved tokens, too
        if self.video is not None:
            rest = _without(self.video, "video", num_videos, rest)
        typed = [token for token in self.reserved if token in rest]
        if typed:
            raise refusal(
                "placeholders",
                f"the text beside the images has {' and '.join(typed)}, which the model reads as a part of an image: "
                "leave it out, or send the text without images",
            )


def _without(placeholder: re.Pattern[str], noun: str, number: int, prompt: str) -> str:
    """Returns the prompt without the placeholders, of which it must have `number`."""
    found = placeholder.findall(prompt)
    if len(found) != number:
        example = f" (such as {found[0]:.100})" if found else ""
        raise refusal(
            "placeholders",
            f"the prompt has {_count(len(found), noun + ' placeholder')}{example} for {_count(number, noun)}: write "
            f"one for each {noun}, and none in the text",
        )
    return placeholder.sub(" ", prompt)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
