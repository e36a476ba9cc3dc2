"""Which images' encoder blocks are replayed, and that replays compute what the blocks do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtok_sglang import encoder_graphs
from mmtok_sglang.encoder_graphs import EncoderGraphs, are_on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


class Encoder(nn.Module):
    """Four blocks, of which the output of the second is read, too; what they add depends on the layout."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4)).to(device)

    @torch.inference_mode()
    def forward(self, rows: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        read: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            rows = block(rows, added=added)
            if index == 1:
                read.append(rows)
        return read[0], rows


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, rows: Tensor, *, added: Tensor) -> Tensor:
        return torch.tanh(self.linear(rows) + added)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "cpu":
        from tests.runtime.emulated_graphs import record_on_host

        monkeypatch.setattr(encoder_graphs, "are_on", lambda _: True)
        monkeypatch.setattr(encoder_graphs, "record", record_on_host)
    return name


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    counted: list[None] = []
    monkeypatch.setattr(encoder_graphs, "_count_replay", lambda: counted.append(None))
    return counted


def given(num_rows: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns hidden states, and what depends on their number alone."""
    rows = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(seed))
    return rows.to(device), torch.full((16,), num_rows / 10, device=device)


def test_replays_compute_what_the_blocks_do(device: str, replays: list[None]) -> None:
    expected, encoder = Encoder(device), Encoder(device)
    graphs = EncoderGraphs(encoder.blocks, [1])
    results = []
    # Two sizes in turn: their graphs share memory.
    for seed in range(12):
        rows, added = given(3 + seed % 2, seed, device)
        with graphs.of(len(rows)):
            results.append((encoder(rows, added), expected(rows, added)))
    assert len(replays) == 12 - 2 * 3
    for (read, last), (expected_read, expected_last) in results:
        # No later replay has changed what an earlier one returned.
        torch.testing.assert_close(read, expected_read)
        torch.testing.assert_close(last, expected_last)


def test_an_image_is_captured_when_its_size_is_seen_for_the_third_time(device: str, replays: list[None]) -> None:
    encoder = Encoder(device)
    graphs = EncoderGraphs(encoder.blocks, [1])
    for number in range(1, 6):
        with graphs.of("size"):
            encoder(*given(3, number, device))
        assert len(replays) == max(0, number - 3)


def test_rare_sizes_and_those_without_a_layout_run_as_before(device: str, replays: list[None]) -> None:
    encoder = Encoder(device)
    graphs = EncoderGraphs(encoder.blocks, [1])
    for number in range(100):
        with graphs.of(number % 20):
            encoder(*given(3, number, device))
        with graphs.of(None):
            encoder(*given(3, number, device))
    assert not replays
    assert not graphs._captured


def test_no_more_sizes_are_kept_than_allowed(device: str, replays: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_graphs, "_MAX_LAYOUTS", 2)
    encoder = Encoder(device)
    graphs = EncoderGraphs(encoder.blocks, [1])
    for size in (1, 2, 1, 3):
        for seed in range(4):
            with graphs.of(size):
                encoder(*given(size, seed, device))
    # The one that was used longest ago has gone.
    assert list(graphs._captured) == [1, 3]


def test_an_image_that_fails_leaves_nothing_behind(device: str, replays: list[None]) -> None:
    encoder, expected = Encoder(device), Encoder(device)
    graphs = EncoderGraphs(encoder.blocks, [1])
    for number in range(6):
        rows, added = given(3, number, device)
        with suppress(ValueError), graphs.of("size"):
            encoder(rows, added)
            raise ValueError
    assert not graphs._captured
    with graphs.of("size"):
        torch.testing.assert_close(encoder(rows, added), expected(rows, added))
    assert "size" in graphs._captured


def test_a_capture_that_fails_ends_captures_and_the_image_is_encoded(
    monkeypatch: pytest.MonkeyPatch, replays: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(run: Callable[[], Tensor], pool: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(encoder_graphs, "are_on", lambda _: True)
    monkeypatch.setattr(encoder_graphs, "record", out_of_memory)
    encoder, expected = Encoder("cpu"), Encoder("cpu")
    graphs = EncoderGraphs(encoder.blocks, [1])
    for number in range(6):
        rows, added = given(3, number, "cpu")
        with graphs.of("size"):
            torch.testing.assert_close(encoder(rows, added), expected(rows, added))
    assert [record.getMessage() for record in caplog.records] == [
        "MMTok: the vision encoder cannot be captured, and runs without CUDA graphs from now on"
    ]


def test_attention_that_waits_for_the_device_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, replays: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoder_graphs, "are_on", lambda _: True)
    encoder = Encoder("cpu")
    attention: Any = nn.Module()
    attention.qkv_backend_name = "sdpa"
    encoder.blocks[0].attn = attention
    graphs = EncoderGraphs(encoder.blocks, [])
    for number in range(6):
        with graphs.of("size"):
            encoder(*given(3, number, "cpu"))
    assert not graphs._captured
    (message,) = caplog.messages
    assert "--mm-attention-backend sdpa cannot be captured, expected one of triton_attn, fa3, fa4" in message


def test_they_are_on_with_one_gpu_unless_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_VIT_ENABLE_CUDA_GRAPH", raising=False)
    gpu = torch.device("cuda")
    assert are_on(gpu)
    assert not are_on(torch.device("cpu"))
    monkeypatch.setenv("SGLANG_VIT_ENABLE_CUDA_GRAPH", "0")
    assert not are_on(gpu)
    monkeypatch.delenv("SGLANG_VIT_ENABLE_CUDA_GRAPH")
    monkeypatch.setattr(encoder_graphs, "num_ranks", lambda: 2)
    assert not are_on(gpu)


def test_a_capture_is_logged(device: str, replays: list[None], caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(device)
    graphs = EncoderGraphs(encoder.blocks, [1])
    with caplog.at_level(logging.INFO):
        for number in range(5):
            with graphs.of((1, 36, 24)):
                encoder(*given(3, number, device))
    (message,) = caplog.messages
    assert message.startswith("MMTok: the vision encoder is captured for images of layout (1, 36, 24) in ")
