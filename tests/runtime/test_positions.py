from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult, MultiModalStaticCache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor

from mmtok_sglang.cache_key import keys_of
from mmtok_sglang.metrics import SelectionMetrics
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.positions import PositionWriter, bound_by_positions, receive_positions, send_positions
from mmtok_sglang.selection import TokenSelector
from tests.runtime.stand_ins import identified, image_item, image_tokens, make_settings, mrope_positions

NUM_TOKENS, NUM_KEPT = 12, 5


def pruned_image(start: int, key: int, *, with_positions: bool = True) -> Any:
    positions = mrope_positions(NUM_TOKENS) * 10 + key if with_positions else None
    plan = ImagePlan(NUM_TOKENS, NUM_KEPT, guidance=[key], positions=positions)
    return identified(image_item((start, start + NUM_KEPT - 1), plan), bytes([key] * 32))


def mm_inputs(*items: Any, shift: int = 0) -> Any:
    """Returns a request's inputs, whose images stand where they were planned to, or behind `shift` earlier tokens."""
    positions = torch.zeros(3, 100, dtype=torch.int64)
    for item in items:
        ((start, _),) = item.offsets
        planned = (item.model_specific_data.get("mmtok") or {}).get("positions")
        if planned is not None:
            positions[:, start] = planned[:, 0] + shift
    return SimpleNamespace(mm_items=list(items), mrope_positions=positions)


def make_batch(*chunks: tuple[Any, int, int], mode: ForwardMode = ForwardMode.EXTEND) -> Any:
    """Returns a batch of (multimodal inputs or None, tokens done before, tokens in this chunk)."""
    inputs, starts, lengths = (list(column) for column in zip(*chunks, strict=True))
    return SimpleNamespace(
        forward_mode=mode,
        mm_inputs=inputs,
        contains_mm_inputs=lambda: any(one is not None for one in inputs),
        extend_prefix_lens_cpu=starts,
        extend_seq_lens_cpu=lengths,
        mrope_positions=torch.full((3, sum(lengths)), -1),
    )


class Encoder:
    """What SGLang does when it embeds a batch: selects each image once, then drops the batch's inputs."""

    def __init__(self) -> None:
        self.selector = TokenSelector(make_settings(NUM_KEPT), SelectionMetrics())
        self.selector.start(torch.device("cpu"))
        self.writer = PositionWriter(self.selector)
        self.encoded: list[int] = []

    def embed(self, batch: Any) -> None:
        for inputs in batch.mm_inputs:
            for item in inputs.mm_items if inputs is not None else []:
                cache = mm_schedule.embedding_cache
                if cache is None or cache.get_single(item.hash) is None:
                    self.encoded.append(item.hash)
                    values = dict(item.model_specific_data.get("mmtok") or {})
                    if values:
                        image, embed = image_tokens(0, ImagePlan(**values), seed=item.hash % 1000)
                        names = keys_of(item)
                        assert names is not None
                        self.selector.select([replace(image, names=names)], embed)
        batch.mm_inputs = None

    def run(self, batch: Any) -> Tensor:
        # Read before: what the forward pass holds is the tensor, so the writing has to be in place.
        positions: Tensor = batch.mrope_positions
        spans = self.writer.spans(batch)
        self.embed(batch)
        self.writer.write(spans, batch.mrope_positions)
        return positions

    def kept_positions(self, item: Any) -> Tensor:
        kept = self.selector.remembered((keys_of(item).selection, 0))  # type: ignore[union-attr]
        assert kept is not None
        positions: Tensor = item.model_specific_data["mmtok"]["positions"][:, kept]
        return positions


@pytest.fixture(autouse=True)
def no_embedding_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm_schedule, "embedding_cache", None)


def untouched(num_tokens: int) -> Tensor:
    return torch.full((3, num_tokens), -1)


@pytest.mark.parametrize("chunk_len", [1, 2, 3, 4, 7, 10])
def test_chunks_through_the_middle_of_an_image_add_up(chunk_len: int) -> None:
    # Two tokens of text, the image's five, three of text.
    encoder, item, length = Encoder(), pruned_image(2, key=1), 10
    chunks = [(start, min(chunk_len, length - start)) for start in range(0, length, chunk_len)]
    written = torch.cat([encoder.run(make_batch((mm_inputs(item), *chunk))) for chunk in chunks], dim=1)
    assert torch.equal(written, torch.cat([untouched(2), encoder.kept_positions(item), untouched(3)], dim=1))


def test_a_later_turn_of_a_session_counts_on() -> None:
    encoder, item = Encoder(), pruned_image(2, key=1)
    written = encoder.run(make_batch((mm_inputs(item, shift=50), 0, 2 + NUM_KEPT)))
    assert torch.equal(written, torch.cat([untouched(2), encoder.kept_positions(item) + 50], dim=1))


@pytest.mark.parametrize("is_draft_worker", [True, False])
def test_a_draft_model_reads_kept_tokens_at_their_positions(is_draft_worker: bool) -> None:
    encoder, item = Encoder(), pruned_image(2, key=1)
    encoder.run(make_batch((mm_inputs(item), 0, 10)))
    # The model's own positions are written behind the selection.
    batch = make_batch((mm_inputs(item), 4, 6))
    runner, seen = SimpleNamespace(is_draft_worker=is_draft_worker), []
    encoder.writer.position_draft(lambda *arguments: seen.append(arguments), batch, runner, "scheduled")
    assert seen == [(batch, runner, "scheduled")]
    kept = encoder.kept_positions(item)[:, 2:] if is_draft_worker else untouched(3)
    assert torch.equal(batch.mrope_positions, torch.cat([kept, untouched(3)], dim=1))


def test_requests_of_a_batch_are_told_apart() -> None:
    encoder = Encoder()
    one, two, three = pruned_image(1, key=1), pruned_image(0, key=2), pruned_image(6, key=3)
    batch = make_batch(
        (mm_inputs(one), 3, 5),  # from the image's third kept token on
        (None, 0, 4),  # text between them
        (mm_inputs(two, image_item((5, 5)), three), 0, 8),  # an unpruned image between two, the second cut off
    )
    written, expected = encoder.run(batch), untouched(17)
    expected[:, 0:3] = encoder.kept_positions(one)[:, 2:]
    expected[:, 9:14] = encoder.kept_positions(two)
    expected[:, 15:17] = encoder.kept_positions(three)[:, :2]
    assert torch.equal(written, expected)


def test_a_chunk_without_the_image_needs_no_selection() -> None:
    encoder = Encoder()
    item = pruned_image(0, key=1)
    assert torch.equal(encoder.run(make_batch((mm_inputs(item), NUM_KEPT, 3))), untouched(3))


@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.TARGET_VERIFY])
def test_decoding_is_not_touched(mode: ForwardMode) -> None:
    batch = make_batch((mm_inputs(pruned_image(0, key=1)), 0, NUM_KEPT), mode=mode)
    assert torch.equal(Encoder().run(batch), untouched(NUM_KEPT))


def test_a_forgotten_selection_has_the_image_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MultiModalStaticCache(1 << 20)
    monkeypatch.setattr(mm_schedule, "embedding_cache", cache)
    encoder, known, forgotten = Encoder(), pruned_image(0, key=1), pruned_image(NUM_KEPT, key=2)
    encoder.run(make_batch((mm_inputs(known), 0, NUM_KEPT)))
    for item in (known, forgotten):
        cache.set(item.hash, EmbeddingResult(embedding=torch.zeros(NUM_KEPT, 8)))
    encoder.encoded.clear()
    written = encoder.run(make_batch((mm_inputs(known, forgotten), 0, 2 * NUM_KEPT)))
    assert encoder.encoded == [forgotten.hash]
    assert torch.equal(written, torch.cat([encoder.kept_positions(known), encoder.kept_positions(forgotten)], dim=1))


@pytest.mark.parametrize("with_positions", [True, False])
def test_an_image_that_was_not_selected_stops_the_batch(with_positions: bool) -> None:
    encoder = Encoder()
    item = pruned_image(0, key=171, with_positions=with_positions)
    if not with_positions:
        image, embed = image_tokens(0, ImagePlan(NUM_TOKENS, NUM_KEPT, []))
        names = keys_of(item)
        assert names is not None
        encoder.selector.select([replace(image, names=names)], embed)
    batch = make_batch((mm_inputs(item), 0, NUM_KEPT))
    spans = encoder.writer.spans(batch)
    with pytest.raises(RuntimeError, match=r"the image 0x[0-9a-f]+ is in this batch, but was not selected"):
        encoder.writer.write(spans, batch.mrope_positions)


def test_positions_travel_down_the_pipeline() -> None:
    corrected, uncorrected = mrope_positions(4), untouched(4)
    batches = [SimpleNamespace(forward_mode=ForwardMode.EXTEND, mrope_positions=p) for p in (corrected, uncorrected)]
    proxies = SimpleNamespace(tensors={"hidden_states": torch.zeros(4, 8)})
    send_positions(batches[0], proxies)
    receive_positions(batches[1], proxies)
    assert list(proxies.tensors) == ["hidden_states"]
    assert torch.equal(uncorrected, corrected)


def test_decoding_sends_no_positions() -> None:
    proxies = SimpleNamespace(tensors={})
    send_positions(SimpleNamespace(forward_mode=ForwardMode.DECODE, mrope_positions=mrope_positions(1)), proxies)
    assert proxies.tensors == {}


@pytest.mark.parametrize("proxies", [None, SimpleNamespace(tensors={})])
def test_the_first_stage_receives_nothing(proxies: Any) -> None:
    positions = untouched(4)
    receive_positions(SimpleNamespace(mrope_positions=positions), proxies)
    assert torch.equal(positions, untouched(4))


@pytest.mark.parametrize(("max_new_tokens", "generated"), [(None, 9), (4, 4), (50, 9)])
@pytest.mark.parametrize("has_beams", [False, True])
def test_answers_end_with_the_models_positions(max_new_tokens: int | None, generated: int, has_beams: bool) -> None:
    """A prompt of 60 tokens has 90 positions, of a context of 100."""
    beams = SimpleNamespace(max_new_tokens=max_new_tokens or 30) if has_beams else None
    request = SimpleNamespace(
        multimodal_inputs=SimpleNamespace(mrope_position_delta=torch.tensor([[30]])),
        origin_input_ids=[0] * 60,
        sampling_params=SimpleNamespace(max_new_tokens=max_new_tokens),
        beam_group=beams,
    )
    seen: list[Any] = []
    scheduler = SimpleNamespace(model_config=SimpleNamespace(context_len=100))
    bound_by_positions(lambda _, req: seen.append(req), scheduler, request)
    assert seen == [request]
    assert request.sampling_params.max_new_tokens == generated
    if beams is not None:
        assert beams.max_new_tokens == generated
