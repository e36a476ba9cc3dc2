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
    """

    image: re.Pattern[str]
    reserved: Sequence[str] = ()

    def check(self, prompt: str, num_images: int, *, has_videos: bool = False) -> None:
        """Raises ValueError (HTTP 400) unless each image has its placeholder and there is no other.

        Args:
            prompt: Before placeholders are expanded.
            num_images: Images that came with it.
            has_videos: Whether videos did, whose placeholders have the reserved tokens, too.
        """
        found = self.image.findall(prompt)
        if len(found) != num_images:
            example = f" (such as {found[0]:.100})" if found else ""
            raise refusal(
                "placeholders",
                f"the prompt has {_count(len(found), 'image placeholder')}{example} for {_count(num_images, 'image')}: "
                "write one for each image, and none in the text",
            )
        rest = self.image.sub(" ", prompt)
        typed = [] if has_videos else [token for token in self.reserved if token in rest]
        if typed:
            raise refusal(
                "placeholders",
                f"the text beside the images has {' and '.join(typed)}, which the model reads as a part of an image: "
                "leave it out, or send the text without images",
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
