from __future__ import annotations

import logging
import time

import pytest
import torch
from prometheus_client import REGISTRY

from mmtok_sglang import metrics
from mmtok_sglang.metrics import SelectionMetrics, start_clock
from tests.conftest import RunPython

FINITE = torch.ones(2, dtype=torch.bool)
SIZES = [(100, 10), (50, 5)]


class DeviceClock:
    """A clock of a device that is at work until it is told to be done."""

    def __init__(self, elapsed_ms: float) -> None:
        self.done = self.stopped = False
        self._elapsed_ms = elapsed_ms

    def stop(self) -> None:
        self.stopped = True

    def is_done(self) -> bool:
        assert self.stopped
        return self.done

    def elapsed_ms(self) -> float:
        assert self.done
        return self._elapsed_ms


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def value(name: str) -> float:
    return REGISTRY.get_sample_value(f"mmtok:{name}") or 0.0


def encode(counted: SelectionMetrics, num_encoded: int = 0, num_hits: int = 0, held_bytes: int = 0) -> None:
    counted.count_encoding(num_encoded=num_encoded, num_hits=num_hits, num_misses=num_encoded, held_bytes=held_bytes)


def test_a_call_is_counted_when_the_device_is_done_with_it() -> None:
    counted, clocks = SelectionMetrics(), [DeviceClock(2.0), DeviceClock(4.0)]
    names = ("selections_total", "selection_tokens_in_total", "selection_tokens_kept_total")
    times = ("selection_milliseconds_count", "selection_milliseconds_sum")

    def values() -> list[float]:
        return [value(name) for name in (*names, *times)]

    before = values()
    for clock in clocks:
        counted.count_call(clock, SIZES, FINITE)
        assert clock.stopped
    assert values() == before
    clocks[0].done = True
    encode(counted)
    assert [now - then for now, then in zip(values(), before, strict=True)] == [2, 150, 15, 1, 2.0]
    clocks[1].done = True
    encode(counted)
    assert [now - then for now, then in zip(values(), before, strict=True)] == [4, 300, 30, 2, 6.0]


def test_features_that_are_not_finite_are_counted_when_it_is_known(caplog: pytest.LogCaptureFixture) -> None:
    counted, clock = SelectionMetrics(), DeviceClock(1.0)
    before = value("selection_fallbacks_total")
    counted.count_call(clock, SIZES, torch.tensor([True, False]))
    assert (counted.num_fallbacks, caplog.messages) == (0, [])
    clock.done = True
    encode(counted)
    assert counted.num_fallbacks == value("selection_fallbacks_total") - before == 1
    assert "an image of 50 tokens (its features are not finite); 5 evenly spaced tokens instead" in caplog.messages[0]


def test_encodings_are_counted_by_where_features_came_from() -> None:
    names = ("encoded_images_total", "feature_cache_hits_total", "feature_cache_misses_total")
    before = [value(name) for name in names]
    encode(SelectionMetrics(), num_encoded=3, num_hits=2, held_bytes=12345)
    assert [value(name) - then for name, then in zip(names, before, strict=True)] == [3, 2, 3]
    assert value("feature_cache_bytes") == 12345


def test_a_line_in_the_log_once_a_minute(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    counted = SelectionMetrics()

    def select(at_s: float) -> list[str]:
        seconds[0] = 1000 + at_s
        encode(counted, num_encoded=1, num_hits=1, held_bytes=3 << 20)
        clock = DeviceClock(2.0)
        clock.done = True
        counted.count_call(clock, SIZES, FINITE)
        return caplog.messages

    line = "MMTok: {} selections in {} calls of 2.0 ms, {} -> {} tokens, 0 fallbacks; {} images encoded; "
    line += "feature cache: {} hits, {} misses, 3.0 MB"
    first = line.format(2, 1, 150, 15, 1, 1, 1)
    assert select(0) == [first]
    assert select(30) == select(59.9) == [first]
    assert select(60) == [first, line.format(6, 3, 450, 45, 3, 3, 3)]
    assert len(select(100)) == 2


def test_nothing_is_logged_where_nothing_happened(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    encode(SelectionMetrics())
    assert caplog.messages == []


def test_one_rank_reports_for_all(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(metrics, "is_first_rank", lambda: False)

    def counts() -> list[float | None]:
        coverages = REGISTRY.get_sample_value("mmtok:coverage_count", {"family": "llava-1.5", "method": "mmtok"})
        return [value("selections_total"), value("encoded_images_total"), coverages]

    before = counts()
    counted = SelectionMetrics()
    encode(counted, num_encoded=1)
    counted.count_call(start_clock(torch.device("cpu")), SIZES, FINITE)
    counted.count_coverage("llava-1.5", "mmtok", 0.5, 0.6)
    assert counts() == before
    assert caplog.messages == []


def test_the_hosts_clock_measures_and_is_done() -> None:
    clock = start_clock(torch.device("cpu"))
    clock.stop()
    assert clock.is_done()
    assert 0 <= clock.elapsed_ms() < 1000


@pytest.mark.slow
def test_collectors_of_threads_at_once_and_of_kernels_by_whose_they_are(run_python: RunPython) -> None:
    """In a process of its own: this one has the collectors. Triton's hook is called as Triton calls it."""
    program = """
import sys, threading
from mmtok_sglang.refusals import refusal
sys.setswitchinterval(1e-6)
barrier, said = threading.Barrier(8), []
def refuse():
    barrier.wait()
    said.append(str(refusal("image", "no")))
threads = [threading.Thread(target=refuse) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*said)

from types import SimpleNamespace
from prometheus_client import REGISTRY
from triton import knobs
from mmtok_sglang.metrics import count_triton_compiles

seen = []
knobs.runtime.jit_post_compile_hook = lambda **about: seen.append(about["key"])
assert REGISTRY.get_sample_value("mmtok:triton_compiles_total") is None
count_triton_compiles()
print(REGISTRY.get_sample_value("mmtok:triton_compiles_total"))
for module in ("mmtok_deploy.backends.triton_kernels", "sglang.srt.layers", "sglang.srt.layers"):
    knobs.runtime.jit_post_compile_hook(key="k", fn=SimpleNamespace(module=module, name="it"))
print(seen, *(REGISTRY.get_sample_value(f"mmtok:triton_compiles{end}_total") for end in ("", "_elsewhere")))
"""
    run = run_python("-c", program)
    assert run.stdout.splitlines() == [" ".join(["no"] * 8), "0.0", "['k', 'k', 'k'] 1.0 2.0"], run.stderr
