"""Computes which tokens of a picture each method keeps; the server's answer contains only their number."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from PIL import Image

from mmtok_bench.page.pictures import Picture
from mmtok_bench.selected_patches import PatchSelector
from mmtok_deploy.coverage import coverage_curve, coverage_matrix
from mmtok_deploy.methods import MethodName, is_nested
from mmtok_deploy.methods.downsample import grid_within

__all__ = ["Patches"]

# The coverage matrix of more tokens takes gigabytes.
_MAX_TOKENS = 4096


class Patches:
    """Selections with one checkpoint, which is loaded and used in one thread of its own.

    Args:
        load: Loads the checkpoint and returns the selector.
    """

    def __init__(self, load: Callable[[], PatchSelector]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="patches")
        self._selector = self._thread.submit(load)
        # The key is the picture's identity: a picture never changes.
        self._encode = lru_cache(maxsize=16)(lambda picture: self._selector.result().encode(picture.sent))

    def seen(self, picture: Picture) -> Image.Image:
        """Returns the picture as the encoder sees it."""
        # A scene is square, and is shown larger than it is sent.
        if picture.shown is not picture.sent:
            return picture.shown
        return self._thread.submit(lambda: self._encode(picture).image).result()

    def select(self, picture: Picture, question: str, method: MethodName, budget: int | None) -> dict[str, Any]:
        """Returns the selection of a method, in the form that the page draws.

        Args:
            picture: The picture to select from.
            question: The question, which guides the selection.
            method: Name of the method.
            budget: Tokens to keep. None gives all budgets at once, for nested methods only.

        Returns:
            `grid`, rows and columns; `tokens`, the number of tokens, and `pickable`, how many of them may be picked;
            `order`, indices as picked; `coverage`, the share of MMTok's objective after each pick. For `downsample`,
            which picks nothing: `smaller`, the grid of the smaller image, and `token_px`, the side of a token's square.

        Raises:
            ValueError: The method cannot run on the picture or needs a budget, or the picture has too many tokens.
        """
        return self._thread.submit(self._select, picture, question, method, budget).result()

    def _select(self, picture: Picture, question: str, method: MethodName, budget: int | None) -> dict[str, Any]:
        encoded, selector = self._encode(picture), self._selector.result()
        num_tokens = len(encoded.vision)
        if num_tokens > _MAX_TOKENS:
            raise ValueError(f"This picture has {num_tokens:,} tokens, and the page draws at most {_MAX_TOKENS:,}.")
        if budget is None and not is_nested(method):
            raise ValueError(f"{method} keeps other tokens at another budget: it takes one budget at a time")
        answer: dict[str, Any] = {"grid": encoded.grid, "tokens": num_tokens, "pickable": encoded.num_pickable}
        if method == "downsample":
            assert budget is not None
            smaller = grid_within(*encoded.grid, budget)
            return {**answer, "order": [], "coverage": [], "smaller": smaller, "token_px": encoded.token_px}
        text = selector.embed(question)
        # Only tokens that may be picked; with a budget of all tokens, excluded ones would follow.
        order = selector.select(encoded, text, min(budget or num_tokens, encoded.num_pickable), method).order
        with torch.inference_mode():
            matrix = coverage_matrix(encoded.vision, encoded.keys, text, selector.preset.config)
            shares = coverage_curve(matrix, order) / matrix.amax(dim=1).sum()
        return {**answer, "order": order.tolist(), "coverage": [round(share, 4) for share in shares.tolist()]}
