from __future__ import annotations

from mmtok_bench.report.frame import frame_of
from mmtok_bench.report.serve import break_even, serve_lines
from mmtok_bench.results import ResultRow
from mmtok_bench.serve.presets import Size
from tests.bench.serve.made_up_rows import row

LARGE, MIDDLE, SMALL = (1008, 784), (448, 448), (224, 224)


def said(rows: list[ResultRow]) -> list[str]:
    return break_even(serve_lines(frame_of(rows)))


def pair(off_ms: float, pruned_ms: float, size_px: Size, concurrency: int = 1) -> list[ResultRow]:
    return [
        row("none", "off", off_ms, size_px=size_px, concurrency=concurrency),
        row("mmtok", "10%", pruned_ms, size_px=size_px, concurrency=concurrency),
    ]


def test_gains_are_over_the_server_without_the_plugin() -> None:
    rows = [*pair(100, 150, LARGE), row("none", "all", 310), row("downsample", "10%", 90)]
    (sentence,) = said(rows)
    assert "budget 10%: it paid nowhere measured (1008 image tokens, concurrency 1)" in sentence
    assert "time to first token 0.67x as good, requests per second 0.67x" in sentence


def test_a_workload_that_was_not_measured_without_the_plugin_has_no_gain() -> None:
    assert said([row("none", "off", 300, size_px=SMALL), row("mmtok", "10%", 100)]) == []


def test_equal_times_do_not_pay() -> None:
    assert "it paid nowhere" in said(pair(100, 100, LARGE))[0]


def test_it_paid_everywhere() -> None:
    (sentence,) = said([*pair(300, 100, LARGE), *pair(300, 100, SMALL, 4)])
    assert sentence == (
        "qwen2.5-vl-0.5b, prefix cache off, budget 10%: it paid everywhere measured "
        "(64 to 1008 image tokens, concurrency 1 to 4)."
    )


def test_small_images_do_not_pay() -> None:
    (sentence,) = said([*pair(300, 100, LARGE), *pair(100, 90, MIDDLE), *pair(50, 100, SMALL)])
    assert "below 256 image tokens it does not pay at every load measured" in sentence
    assert "64 image tokens at concurrency 1: time to first token 0.50x as good" in sentence
    assert sentence.endswith("Set --mmtok-min-tokens-in 256.")


def test_the_flag_is_above_the_largest_image_that_does_not_pay() -> None:
    (sentence,) = said([*pair(300, 100, LARGE), *pair(90, 100, MIDDLE), *pair(110, 100, SMALL)])
    assert sentence.endswith("Set --mmtok-min-tokens-in 1008.")


def test_a_load_that_does_not_pay_is_named() -> None:
    (sentence,) = said([*pair(300, 100, LARGE, 1), *pair(300, 310, LARGE, 4)])
    assert "does not pay at concurrency 4 with the largest images measured (1008 tokens)" in sentence
    assert "Set" not in sentence


def test_it_paid_nowhere() -> None:
    (sentence,) = said([*pair(100, 110, LARGE), *pair(100, 120, SMALL)])
    assert "it paid nowhere measured (64 to 1008 image tokens, concurrency 1)" in sentence
    assert sentence.endswith("Serve this without a budget.")
