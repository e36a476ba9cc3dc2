"""What the tokenizer process decides about an image or video, and leaves on SGLang's item of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from mmtok_deploy.config import KeySource
from mmtok_deploy.methods import MethodName, reads_attention

__all__ = ["KEY", "ImagePlan", "joined_parts", "places_in_prompt", "plan_of", "share_guidance"]

KEY = "mmtok"
"""What an item's plan is under; names that begin with it are the plugin's."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What the tokenizer process decides about one image; it travels to the scheduler with the image.

    Args:
        num_tokens: N, the image's placeholders before the cut, all of its runs together.
        num_kept: K, its placeholders after it; the selection must return exactly as many tokens.
        guidance: Token ids of the guidance words.
        excluded: [N] bool, tokens never to pick; None if all may be.
        positions: [3, N + T] int64, the M-RoPE positions of the N placeholders and of the text between them; None for
            models with 1-D positions.
        method: What chooses the tokens.
        seed: What a method that draws is seeded with; 0 for the others.
        auto: For the answer's account, what the question asks, the share of the image that repeats nothing beside it,
            and the share of the tokens that it keeps; None where the budget is not "auto".
        num_parts: Parts of equal size, each selected by itself with an equal budget: the frames of a video whose budget
            is shared by them evenly; 1 for one selection of all tokens.
        num_frames: F, the steps in time of a video, N / F tokens each; 1 for an image.
        between: Token ids of the text that stands between the runs of placeholders of a video that has a run for each
            of its F steps in time, [F - 1] lists; empty for one run. In the prompt, all from the first placeholder to
            the last is one span of K + T tokens, T those of the text: where the text stands in it is known when the
            tokens are selected.
        keys: The side of the projector by whose features tokens are compared; "input" for a method that compares none.
        encoded: [M] int64, the tokens that the encoder reads, the first of the image among them; None if it reads all.
            The item has the pixels of these alone, and from features on the image has M tokens: kept ones are counted
            among these, and `positions` has theirs.
    """

    num_tokens: int
    num_kept: int
    guidance: list[int]
    excluded: Tensor | None = None
    positions: Tensor | None = None
    method: MethodName = "mmtok"
    seed: int = 0
    auto: Mapping[str, str | None] | None = None
    num_parts: int = 1
    num_frames: int = 1
    between: list[list[int]] = field(default_factory=list)
    keys: KeySource = "input"
    encoded: Tensor | None = None

    @property
    def num_between(self) -> int:
        """T, the text's tokens between them."""
        return sum(map(len, self.between))

    @property
    def num_encoded(self) -> int:
        """The tokens of the image that the encoder reads."""
        return self.num_tokens if self.encoded is None else len(self.encoded)

    @property
    def encoding(self) -> tuple[object, ...]:
        """What sets the image's features apart from those under other methods."""
        if self.method == "downsample":
            return ("downsample", self.num_kept)
        attention = ("attention",) if reads_attention(self.method) else ()
        return attention if self.encoded is None else ("only", self.encoded, *attention)

    def attach(self, item: Any) -> None:
        """Leaves the plan on SGLang's item, as plain values that its transport can carry."""
        # Not `asdict`, which copies the guidance.
        item.model_specific_data[KEY] = {each.name: getattr(self, each.name) for each in fields(self)}


def plan_of(item: Any) -> ImagePlan | None:
    """Returns the plan of SGLang's item, None for one that is not pruned."""
    values = item.model_specific_data.get(KEY)
    return None if values is None else ImagePlan(**values)


def joined_parts(kept: Sequence[Tensor], plan: ImagePlan) -> Tensor:
    """Returns the kept tokens of all parts of an image, [K] int64 of its N tokens.

    Args:
        kept: Those of each part, [k] int64 of its tokens.
        plan: The image's.
    """
    size = plan.num_tokens // plan.num_parts
    return kept[0] if len(kept) == 1 else torch.cat([each + part * size for part, each in enumerate(kept)])


def places_in_prompt(kept: Tensor, plan: ImagePlan) -> Tensor:
    """Returns where kept tokens and text between the runs stand in the unpruned prompt, from its first placeholder.

    Args:
        kept: [K] int64, of the image's N tokens.
        plan: The image's.

    Returns:
        [K + T] int64, of N + T: the places of the kept tokens in their order, then those of the text in its own. A sort
        of them is the order of the pruned prompt. Nothing waits for the device.
    """
    if not plan.between:
        return kept
    size = plan.num_tokens // plan.num_frames
    text_lens = torch.tensor([len(ids) for ids in plan.between])
    text_before = torch.cat([torch.zeros(1, dtype=torch.int64), text_lens.cumsum(0)])
    text = torch.arange(plan.num_between) + torch.arange(1, plan.num_frames).repeat_interleave(text_lens) * size
    on_device = [each.to(kept.device, non_blocking=True) for each in (text_before, text)]
    return torch.cat([kept + on_device[0][kept // size], on_device[1]])


def share_guidance(items: Sequence[Any]) -> None:
    """Has the images of a request hold equal guidance once: on the way to the scheduler each had its own."""
    known: dict[tuple[int, ...], list[int]] = {}
    for item in items:
        plan = item.model_specific_data.get(KEY)
        if plan is not None:
            plan["guidance"] = known.setdefault(tuple(plan["guidance"]), plan["guidance"])
