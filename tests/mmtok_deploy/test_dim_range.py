from __future__ import annotations

import pytest

from mmtok_deploy.dim_range import DimRange


@pytest.mark.parametrize(
    ("text", "size"),
    [("576", (576, 576, 576)), ("64:4096", (64, 4096, 4096)), ("1:32:256", (1, 32, 256)), ("7:7", (7, 7, 7))],
)
def test_parse(text: str, size: tuple[int, int, int]) -> None:
    assert DimRange.parse(text) == DimRange(*size)
    assert DimRange.parse(str(DimRange(*size))) == DimRange(*size)


@pytest.mark.parametrize("text", ["", "0", "9:4", "4:9:8", "-1", "1:2:3:4", "64-4096", "1:", "1.5", "all"])
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="MIN:OPTIMUM:MAX"):
        DimRange.parse(text)


def test_what_it_holds() -> None:
    size = DimRange(4, 6, 9)
    assert [number for number in range(12) if number in size] == [4, 5, 6, 7, 8, 9]
    assert not size.is_fixed
    assert DimRange.fixed(3).is_fixed
