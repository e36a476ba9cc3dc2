from __future__ import annotations

import pytest

from mmtok_bench.photographs import PHOTOGRAPHS, new_photograph, photograph


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_every_photograph_is_installed(name: str) -> None:
    picture = photograph(name)
    assert picture.mode == "RGB"
    assert min(picture.size) >= 300


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of astronaut, chelsea, coffee, motorcycle, rocket, got 'mona-lisa'"):
        photograph("mona-lisa")


def test_the_seed_decides_the_photograph() -> None:
    one, same, other = (new_photograph((64, 48), seed) for seed in ("a", "a", "b"))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert one.size == (64, 48)
