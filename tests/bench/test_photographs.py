from __future__ import annotations

from mmtok_bench.photographs import new_photograph


def test_the_seed_decides_the_photograph() -> None:
    one, same, other = (new_photograph((64, 48), seed) for seed in ("a", "a", "b"))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert one.size == (64, 48)
