from __future__ import annotations

import pytest

from mmtok_bench.report.metrics import compare, format_value, metric, sort_key, tone


@pytest.mark.parametrize(
    ("name", "value", "reference", "expected", "expected_tone"),
    [
        ("ttft_p50_ms", 100.0, 260.0, "2.60x faster", "gain"),
        ("ttft_p99_ms", 260.0, 100.0, "2.60x slower", "loss"),
        ("ttft_p50_ms", 100.1, 100.0, "the same", ""),
        ("ttft_p50_ms", 100.0, 104.0, "1.04x faster", ""),
        ("ttft_p50_ms", 106.0, 100.0, "1.06x slower", "loss"),
        ("ttft_p50_ms", 1.0, 12345.0, "12345.00x faster", "gain"),
        ("requests_per_s", 3.0, 2.0, "1.50x higher", "gain"),
        ("requests_per_s", 2.0, 3.0, "1.50x lower", "loss"),
        ("max_requests_at_once", 400, 100, "4.00x higher", "gain"),
        ("peak_memory_bytes", 1e9, 2e9, "2.00x smaller", "gain"),
        ("kv_tokens_per_request", 900, 100, "9.00x larger", "loss"),
        ("accuracy", 0.912, 0.9, "+1.2 points", "gain"),
        ("accuracy", 0.9, 0.912, "-1.2 points", "loss"),
        ("image_tokens_kept", 86, 864, "", ""),
        ("ttft_p50_ms", None, 100.0, "", ""),
        ("ttft_p50_ms", 100.0, None, "", ""),
        ("num_failed", 0, 3, "", ""),
    ],
)
def test_a_comparison_says_which_is_better(
    name: str, value: float | None, reference: float | None, expected: str, expected_tone: str
) -> None:
    assert compare(name, value, reference) == expected
    assert tone(expected) == expected_tone


@pytest.mark.parametrize(
    ("name", "value", "label", "shown"),
    [
        ("ttft_p50_ms", 1234.56, "TTFT p50, ms", "1,235"),
        ("itl_p99_ms", 12.345, "inter-token p99, ms", "12.3"),
        ("latency_p50_ms", 0.456, "latency p50, ms", "0.46"),
        ("requests_per_s", 1.5, "requests/s", "1.50"),
        ("image_tokens_in", 867.6, "image tokens in", "867.6"),
        ("image_tokens_in", 2880, "image tokens in", "2,880"),
        ("peak_memory_bytes", 3 * 2**29, "peak memory, GiB", "1.50"),
        ("accuracy", 0.9123, "accuracy, %", "91.2"),
        ("warm_up_ms", 3.0, "warm up ms", "3.00"),
        ("num_turns", 3, "num turns", "3"),
    ],
)
def test_labels_and_values(name: str, value: float, label: str, shown: str) -> None:
    assert metric(name).label == label
    assert format_value(name, value) == shown
    assert format_value(name, None) == ""


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        ("2.60x faster", 2.6),
        ("1.25x slower", 0.8),
        ("the same", 1),
        ("1,008 → 100", 100),
        ("15,754 → 9,254", 9254),
        ("-3.1 points", -3.1),
        ("96.5", 96.5),
        ("1008x672", 1008),
        ("10%", 10),
        ("", None),
        ("not measured", None),
    ],
)
def test_a_cell_is_sorted_by_its_gain_or_its_last_number(cell: str, key: float | None) -> None:
    assert sort_key(cell) == key
