"""Compares a graph's selection from one image with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok_deploy.engine_check import hold_to_reference
from mmtok_deploy.greedy_replay import GreedyReplay, WrongPickError
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.problem import Selection, SelectionProblem

__all__ = ["CheckFailedError", "Compared", "hold_image"]


class CheckFailedError(Exception):
    """The selection of an exported file differs from the reference's."""


class Compared:
    """Numbers of picks that were compared with the reference, and of those that are equal up to float32 rounding."""

    def __init__(self) -> None:
        self.num_picks = self.num_close = 0

    def add(self, replay: GreedyReplay) -> None:
        """Adds the picks of one image."""
        self.num_picks += len(replay.coverage)
        self.num_close += replay.num_close_calls

    def __str__(self) -> str:
        close = f"{self.num_close} of them within rounding of the best" if self.num_close else "all equal"
        return f"{self.num_picks} picks compared, {close}"


def hold_image(inputs: dict[str, Tensor], outputs: dict[str, Tensor], manifest: Manifest) -> GreedyReplay:
    """Returns the replay of one image's selection, after comparing it with the reference.

    Args:
        inputs: The image's `vision`, `keys`, `text`, `text_mask`, `excluded` and, if the graph takes it, `budget`.
        outputs: The selection's outputs for the image.
        manifest: The graph's manifest.

    Raises:
        CheckFailedError: A token, the order, a row or a coverage value differs.
    """
    vision, excluded = inputs["vision"], inputs["excluded"]
    asked = int(inputs["budget"]) if "budget" in inputs else None
    num_picks = min(manifest.num_kept(len(vision), asked), len(vision) - int(excluded.sum()))
    problem = SelectionProblem(vision, inputs["keys"], inputs["text"][inputs["text_mask"]], num_picks, excluded)
    order, kept = outputs["order"], outputs["kept"]
    if (order[num_picks:] != -1).any() or (kept[num_picks:] != -1).any():
        raise CheckFailedError(f"only {num_picks} tokens may be picked, got {order.tolist()}, kept {kept.tolist()}")
    selection = Selection(order[:num_picks], kept[:num_picks], outputs["coverage"][:num_picks], outputs["total"])
    try:
        replay = hold_to_reference(problem, manifest.constants, selection)
    except WrongPickError as error:
        raise CheckFailedError(str(error)) from error
    if not torch.equal(outputs["visual_tokens"][:num_picks], vision[selection.kept]):
        raise CheckFailedError("visual_tokens are not the rows that kept names")
    return replay
