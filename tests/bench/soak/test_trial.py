"""What a row counts and reports, and when it fails."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from PIL import Image

from mmtok_bench.client import in_parallel
from mmtok_soak.images import odd_images
from mmtok_soak.storm import _judge_growth
from mmtok_soak.trial import Trial


def trial(minutes: float = 30.0, num_families: int = 1) -> Trial:
    return Trial("qwen2.5-vl", Path("unused"), minutes=minutes, num_families=num_families)


@pytest.mark.parametrize(
    ("minutes", "num_families", "count"), [(30, 1, 6000), (60, 1, 6000), (30, 2, 3000), (5, 2, 500), (0.1, 2, 200)]
)
def test_counts_are_scaled_by_minutes_and_families(minutes: float, num_families: int, count: int) -> None:
    assert trial(minutes, num_families).scaled(6000, at_least=200) == count


@pytest.mark.parametrize(("mb_per_1000", "fails"), [(0.0, False), (0.9, False), (1.1, True), (-3.0, False)])
def test_memory_that_grows_by_a_megabyte_per_thousand_requests_fails(mb_per_1000: float, fails: bool) -> None:
    row = trial()
    # The first half does not count: everything is new then.
    sizes = [(number, 2 << 30) for number in range(0, 1000, 50)]
    sizes += [(number, (3 << 30) + round(number * mb_per_1000 * 2**20 / 1000)) for number in range(1000, 2000, 50)]
    _judge_growth(row, sizes, 2000)
    assert row.numbers["growth_mb_per_1000"] == pytest.approx(mb_per_1000, abs=0.01)
    assert [failure.what for failure in row.failures] == ["resident memory grows"] * fails


def test_the_error_of_growth_is_measured() -> None:
    row = trial()
    # A megabyte up and down.
    _judge_growth(row, [(number, (1 << 30) + ((number % 20 // 10) << 20)) for number in range(0, 2000, 10)], 2000)
    # 0.5 / sqrt(n) over the standard deviation of n = 100 numbers over a range of 1,000, in thousands.
    assert row.numbers["growth_error_mb_per_1000"] == pytest.approx(0.5 / 10 / 0.289, rel=0.05)


def test_memory_of_few_requests_is_measured_and_not_judged() -> None:
    row = trial()
    _judge_growth(row, [(number, number << 20) for number in range(100)], 100)
    assert row.numbers["growth_mb_per_1000"] == 1000
    assert not row.failures


def test_the_first_error_of_parallel_work_drops_what_has_not_begun() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(KeyboardInterrupt):
        in_parallel(2, work, range(10_000))
    assert len(done) < 1000


def test_odd_images_are_what_they_are_called() -> None:
    images = dict(odd_images())
    for mode in ("LA", "P", "RGBA"):
        with Image.open(io.BytesIO(images[f"mode {mode} PNG"])) as image:
            assert image.mode == mode
    with Image.open(io.BytesIO(images["mode CMYK JPEG"])) as image:
        assert image.mode == "CMYK"
    with Image.open(io.BytesIO(images["mode I;16 PNG"])) as image:
        assert image.mode.startswith("I")
    with Image.open(io.BytesIO(images["palette with transparency"])) as image:
        assert "transparency" in image.info
    with Image.open(io.BytesIO(images["animated GIF"])) as image:
        assert getattr(image, "n_frames", 1) > 1
    assert len(images) > 30
