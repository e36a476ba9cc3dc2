from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtok_sglang import stages
from mmtok_sglang.stages import StageMetrics, image_stage
from tests.runtime.test_metrics import DeviceClock, value

MODEL = torch.nn.Linear(1, 1)
CPU = torch.device("cpu")
PREFILL = ("milliseconds_count", "milliseconds_sum", "requests_total", "tokens_total")


def batch() -> Any:
    return SimpleNamespace(batch_size=3, extend_seq_lens_cpu=[100, 15, 5])


def prefilled() -> list[float]:
    return [value(f"language_prefill_{name}") for name in PREFILL]


def since(before: list[float]) -> list[float]:
    return [now - then for now, then in zip(prefilled(), before, strict=True)]


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[DeviceClock]:
    """Every clock started, the nth of n milliseconds."""
    started: list[DeviceClock] = []

    def start_clock(_device: torch.device) -> DeviceClock:
        started.append(DeviceClock(len(started) + 1))
        return started[-1]

    monkeypatch.setattr(stages, "start_clock", start_clock)
    return started


def test_a_prefill_is_counted_when_the_device_is_done_with_it(clocks: list[DeviceClock]) -> None:
    counted, before = StageMetrics(), prefilled()
    assert counted.forward(lambda: "logits", batch(), CPU) == "logits"
    assert since(before) == [0, 0, 0, 0]
    clocks[0].done = True
    counted.settle()
    assert since(before) == [1, 1.0, 3, 120]
    assert len(clocks) == 1


def test_a_prefill_that_cannot_be_timed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clock(_device: torch.device) -> None:
        raise RuntimeError("no event")

    counted, before = StageMetrics(), prefilled()

    def run() -> str:
        monkeypatch.setattr(stages, "start_clock", no_clock)
        counted.start_language_model(CPU)
        return "logits"

    for _ in range(2):  # the clock of the language model fails, then that of the prefill
        assert counted.forward(run, batch(), CPU) == "logits"
    counted.settle()
    assert since(before) == [0, 0, 0, 0]


def test_a_prefill_begins_after_the_embedding_of_its_images(clocks: list[DeviceClock]) -> None:
    counted, before = StageMetrics(), prefilled()

    counted.forward(lambda: counted.start_language_model(CPU), batch(), CPU)
    assert [clock.stopped for clock in clocks] == [False, True]
    clocks[1].done = True
    counted.settle()
    assert since(before)[:2] == [1, 2.0]


def test_a_prefill_that_fails_is_not_counted(clocks: list[DeviceClock]) -> None:
    def run() -> None:
        raise RuntimeError("no memory")

    counted, before = StageMetrics(), prefilled()
    with pytest.raises(RuntimeError, match="no memory"):
        counted.forward(run, batch(), CPU)
    counted.start_language_model(CPU)
    counted.settle()
    assert since(before) == [0, 0, 0, 0]
    assert [clock.stopped for clock in clocks] == [False]


def test_a_call_of_the_encoder_and_its_images_are_counted(clocks: list[DeviceClock]) -> None:
    names = ("vision_encoder_milliseconds_count", "vision_encoder_milliseconds_sum", "vision_encoder_images_total")
    counted, before = StageMetrics(), [value(name) for name in names]
    assert counted.encode(lambda model, items: (model, items), MODEL, ["one", "two"]) == (MODEL, ["one", "two"])
    clocks[0].done = True
    counted.encode(lambda *_: None, MODEL, ["three"])
    assert [value(name) - then for name, then in zip(names, before, strict=True)] == [1, 1.0, 2]


def test_one_rank_times_for_all(monkeypatch: pytest.MonkeyPatch, clocks: list[DeviceClock]) -> None:
    monkeypatch.setattr(stages, "is_first_rank", lambda: False)
    counted = StageMetrics()
    assert counted.encode(lambda *_: "features", MODEL, []) == "features"
    assert counted.forward(lambda: "logits", batch(), CPU) == "logits"
    counted.start_language_model(CPU)
    assert clocks == []


def test_a_step_of_an_image_is_timed_unless_it_fails() -> None:
    names = ("image_hash_milliseconds_count", "image_hash_milliseconds_sum")
    before = [value(name) for name in names]
    with image_stage("hash"):
        time.sleep(0.02)
    with pytest.raises(ValueError, match="no image"), image_stage("hash"):
        raise ValueError("no image")
    count, milliseconds = (value(name) - then for name, then in zip(names, before, strict=True))
    assert count == 1
    assert 20 <= milliseconds < 1000
