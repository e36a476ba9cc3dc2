from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from mmtok_bench.load_images import new_document, new_photograph


@pytest.mark.parametrize("new_image", [new_photograph, new_document])
def test_the_seed_decides_the_image(new_image: Callable[[tuple[int, int], str], Image.Image]) -> None:
    one, same, other = (new_image((200, 150), seed) for seed in ("a", "a", "b"))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert one.size == (200, 150)


def test_a_document_is_mostly_paper() -> None:
    is_white = (np.array(new_document((1008, 672), "page")) == 255).all(axis=2)
    assert 0.8 < is_white.mean() < 0.98
    assert is_white[:60].all()
