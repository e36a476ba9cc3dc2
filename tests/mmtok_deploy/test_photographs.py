from __future__ import annotations

import pytest

from mmtok_deploy.photographs import PHOTOGRAPHS, photograph


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_every_photograph_is_installed(name: str) -> None:
    picture = photograph(name)
    assert picture.mode == "RGB"
    assert min(picture.size) >= 300


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of astronaut, chelsea, coffee, motorcycle, rocket, got 'mona-lisa'"):
        photograph("mona-lisa")
