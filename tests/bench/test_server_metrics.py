from __future__ import annotations

import os
import time

import pytest

from mmtok_bench.server_metrics import PeakMemory, parse_counts, stage_metrics

BEFORE = """\
# HELP mmtok:selection_milliseconds Time of a selection call.
# TYPE mmtok:selection_milliseconds histogram
mmtok:selection_milliseconds_bucket{le="1.0"} 1.0
mmtok:selection_milliseconds_bucket{le="+Inf"} 2.0
mmtok:selection_milliseconds_sum 10.5
mmtok:selection_milliseconds_count 2.0
# HELP mmtok:selection_fallbacks_total Images that kept evenly spaced tokens.
# TYPE mmtok:selection_fallbacks_total counter
mmtok:selection_fallbacks_total 0.0
# HELP sglang:num_requests_total Requests.
# TYPE sglang:num_requests_total counter
sglang:num_requests_total{model_name="it"} 7.0
"""
AFTER = BEFORE.replace("_sum 10.5", "_sum 30.5").replace("fallbacks_total 0.0", "fallbacks_total 1.0") + (
    "# TYPE mmtok:language_prefill_milliseconds histogram\n"
    'mmtok:language_prefill_milliseconds_bucket{le="+Inf",pid="1"} 1.0\n'
    'mmtok:language_prefill_milliseconds_sum{pid="1"} 300.0\n'
    'mmtok:language_prefill_milliseconds_count{pid="1"} 1.0\n'
    'mmtok:language_prefill_milliseconds_bucket{le="+Inf",pid="2"} 1.0\n'
    'mmtok:language_prefill_milliseconds_sum{pid="2"} 100.0\n'
    'mmtok:language_prefill_milliseconds_count{pid="2"} 1.0\n'
)


def test_the_plugins_counts_are_read_and_nobody_elses() -> None:
    assert parse_counts(BEFORE) == {
        "mmtok:selection_milliseconds_sum": 10.5,
        "mmtok:selection_milliseconds_count": 2,
        "mmtok:selection_fallbacks_total": 0,
    }


def test_stages_are_differences_a_request() -> None:
    assert stage_metrics(parse_counts(BEFORE), parse_counts(AFTER), 4) == pytest.approx(
        {"selection_ms": 5, "language_prefill_ms": 100, "num_fallbacks": 1}
    )


def test_a_server_without_the_plugin_has_no_stages() -> None:
    assert stage_metrics({}, parse_counts('# TYPE sglang:x counter\nsglang:x_total{a="b"} 1.0\n'), 4) == {}


def test_the_peak_is_seen_though_it_is_over() -> None:
    held = bytearray(os.urandom(1024) * 100_000)
    with PeakMemory(os.getpid(), on_cpu=True) as memory:
        # The first look is at once.
        time.sleep(0.3)
    assert memory.peak_bytes > len(held)
