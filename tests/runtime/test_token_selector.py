from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from prometheus_client import REGISTRY
from sglang.srt.distributed import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmtok_deploy import select_tokens
from mmtok_deploy.backends.blocked import MAX_BYTES
from mmtok_deploy.backends.triton_plan import FeatureTypes
from mmtok_deploy.config import KeySource
from mmtok_deploy.coverage import coverage_bound
from mmtok_deploy.executors import TorchExecutor, make_executor
from mmtok_deploy.methods import MethodName, comparator, needs_frames
from mmtok_deploy.problem import Selection, SelectionProblem
from mmtok_sglang import ranks, selection
from mmtok_sglang.cache_key import digest
from mmtok_sglang.families import FAMILIES
from mmtok_sglang.memory import MAX_SELECTION_BYTES
from mmtok_sglang.metrics import SelectionMetrics, collectors
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.selection import ImageTokens, Outcome, TokenSelector
from tests.runtime.stand_ins import features, image_names, image_tokens, make_settings

PLAN = ImagePlan(num_tokens=12, num_kept=5, guidance=[3, 1, 2])
SETTINGS = make_settings(5)
EVENLY_SPACED = [0, 2, 5, 8, 11]


def make_selector() -> TokenSelector:
    selector = TokenSelector(SETTINGS, SelectionMetrics())
    selector.start(torch.device("cpu"))
    return selector


def key_of(key: object) -> tuple[bytes | None, int]:
    return image_names(key).selection, 0


def num_fallbacks(selector: TokenSelector) -> int:
    return selector._metrics.num_fallbacks


def selected(selector: TokenSelector, plan: ImagePlan = PLAN, key: object = 1, seed: int = 0) -> list[int]:
    image, embed = image_tokens(key, plan, seed)
    (kept,) = selector.select([image], embed)
    indices: list[int] = kept.tolist()
    return indices


class WatchedExecutor:
    """The automatic executor, watched; fails where `fails` says so."""

    name = "watched"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[SelectionProblem], bool] = lambda _: False):
        self.batches: list[list[int]] = []
        self._fails = fails
        self._select = make_executor("auto", torch.device("cpu"), SETTINGS.config).select
        monkeypatch.setattr(selection, "make_executor", lambda *_: self)

    def select(self, problems: Sequence[SelectionProblem]) -> list[Selection]:
        self.batches.append([len(problem.vision) for problem in problems])
        if any(map(self._fails, problems)):
            raise torch.OutOfMemoryError("no memory")
        return self._select(problems)


@pytest.mark.parametrize("guidance", [[3, 1, 2], [7], []])
@pytest.mark.parametrize("excluded", [None, [0, 4, 11]])
def test_selects_what_the_reference_selects(guidance: list[int], excluded: list[int] | None) -> None:
    vision, keys, embed = features(12)
    mask = None if excluded is None else torch.isin(torch.arange(12), torch.tensor(excluded))
    plan = replace(PLAN, guidance=guidance, excluded=mask)
    text = embed(torch.tensor(guidance, dtype=torch.int64))
    expected = select_tokens(vision, keys, text, 5, config=SETTINGS.config, excluded=mask).kept
    selector = make_selector()
    assert selected(selector, plan) == expected.tolist()
    assert num_fallbacks(selector) == 0


@pytest.mark.parametrize("of_server", ["mmtok", "text-coverage", "even"])
@pytest.mark.parametrize("method", get_args(MethodName))
def test_each_method_is_asked_by_its_name(method: MethodName, of_server: MethodName) -> None:
    num_frames = 3 if needs_frames(method) else 1
    plan = replace(PLAN, method=method, num_kept=12 if method == "downsample" else 5, num_frames=num_frames)
    image, embed = image_tokens(1, plan)
    image = replace(image, attention=torch.arange(12).flip(0).float())
    text = embed(torch.tensor(plan.guidance))
    selector = TokenSelector(replace(SETTINGS, method=of_server), SelectionMetrics())
    selector.start(torch.device("cpu"))
    (kept,) = selector.select([image], embed)
    if method == "mmtok":
        expected = select_tokens(image.vision, image.keys, text, 5, config=SETTINGS.config)
    else:
        asked = SelectionProblem(
            image.vision, image.keys, text, plan.num_kept, None, image.attention, image.seed, num_frames
        )
        (expected,) = comparator(method)([asked], SETTINGS.config)
    assert kept.tolist() == expected.kept.tolist()
    assert num_fallbacks(selector) == 0


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, list | tuple) else [output]:
            if isinstance(each, torch.Tensor):
                self.size_bytes = max(self.size_bytes, each.untyped_storage().nbytes())
        return output


def test_a_long_video_is_selected_from_without_its_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    # A quarter of a long video's tokens, and a sixteenth of the bound of a GPU, as the matrix has of its bytes.
    num_tokens, max_bytes = 65 * 64, MAX_BYTES // 16
    monkeypatch.setattr("mmtok_deploy.backends.blocked.max_matrix_bytes", lambda _: max_bytes)
    monkeypatch.setattr("mmtok_deploy.executors.max_matrix_bytes", lambda _: max_bytes)
    plan = ImagePlan(num_tokens, 6, guidance=[3, 1], num_frames=65)
    image, embed = image_tokens(1, plan)
    selector = make_selector()
    with LargestTensor() as largest:
        (kept,) = selector.select([image], embed)
    assert num_fallbacks(selector) == 0
    assert kept.unique().tolist() == kept.tolist()
    assert len(kept) == 6
    assert largest.size_bytes <= max_bytes < 4 * num_tokens**2


def test_methods_of_one_batch_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [PLAN, replace(PLAN, method="even"), replace(PLAN, method="vision-coverage"), PLAN]
    images = [image_tokens(key, plan, seed=key)[0] for key, plan in enumerate(plans)]
    embed = features(1)[2]
    backend = WatchedExecutor(monkeypatch)
    together = [kept.tolist() for kept in make_selector().select(images, embed)]
    assert backend.batches == [[12, 12]]
    assert together[1] == EVENLY_SPACED
    assert together == [make_selector().select([image], embed)[0].tolist() for image in images]


@pytest.mark.parametrize("of_server", ["input", "output"])
def test_keys_of_one_batch_do_not_mix(monkeypatch: pytest.MonkeyPatch, of_server: KeySource) -> None:
    """Those of the server's side go through its executor, which was made ready for their width."""
    plans = [PLAN, replace(PLAN, keys="output"), replace(PLAN, keys="output")]
    images = [image_tokens(key, plan, seed=key)[0] for key, plan in enumerate(plans)]
    images = [replace(image, keys=image.vision) if image.plan.keys == "output" else image for image in images]
    embed = features(1)[2]
    backend = WatchedExecutor(monkeypatch)
    selector = TokenSelector(replace(SETTINGS, keys=of_server), SelectionMetrics())
    selector.start(torch.device("cpu"))
    kept = [each.tolist() for each in selector.select(images, embed)]
    assert backend.batches == ([[12]] if of_server == "input" else [[12, 12]])
    text = embed(torch.tensor(PLAN.guidance))
    expected = [select_tokens(image.vision, image.keys, text, 5, config=SETTINGS.config).kept for image in images]
    assert kept == [each.tolist() for each in expected]
    assert num_fallbacks(selector) == 0


def test_random_tokens_are_of_the_image_the_question_and_the_seed() -> None:
    plan = replace(PLAN, num_tokens=576, num_kept=30, method="random")
    first = selected(make_selector(), plan, key=(5, 0))
    assert selected(make_selector(), plan, key=(5, 0), seed=9) == first
    others = [selected(make_selector(), plan, key=key) for key in ((6, 0), (5, 1))]
    assert first not in [*others, selected(make_selector(), replace(plan, seed=1), key=(5, 0))]


def test_a_method_that_fails_falls_back() -> None:
    selector = make_selector()
    assert selected(selector, replace(PLAN, method="visionzip")) == EVENLY_SPACED
    assert selected(selector, replace(PLAN, method="text-coverage", guidance=[]), key=2) == EVENLY_SPACED
    assert num_fallbacks(selector) == 2


PLANS = [
    PLAN,
    ImagePlan(num_tokens=7, num_kept=3, guidance=[]),
    ImagePlan(num_tokens=20, num_kept=4, guidance=[3, 1, 2], excluded=torch.arange(20) % 5 == 0),
    ImagePlan(num_tokens=12, num_kept=5, guidance=[9]),
]


def test_the_images_of_a_batch_are_one_call_and_embedded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [selected(make_selector(), plan, seed=seed) for seed, plan in enumerate(PLANS)]
    backend = WatchedExecutor(monkeypatch)
    images = [image_tokens(seed, plan, seed)[0] for seed, plan in enumerate(PLANS)]
    _, _, embed = features(1)
    embedded: list[list[int]] = []

    def watched(ids: Tensor) -> Tensor:
        embedded.append(ids.tolist())
        rows: Tensor = embed(ids)
        return rows

    # Each stand-in has embeddings of its own: take the first one's for all.
    expected = [
        select_tokens(
            image.vision,
            image.keys,
            embed(torch.tensor(plan.guidance, dtype=torch.int64)),
            plan.num_kept,
            config=SETTINGS.config,
            excluded=plan.excluded,
        ).kept.tolist()
        for image, plan in zip(images, PLANS, strict=True)
    ]
    kept = make_selector().select(images, watched)
    assert [indices.tolist() for indices in kept] == expected
    assert [len(indices) for indices in expected] == [len(indices) for indices in alone]
    assert backend.batches == [[12, 7, 20, 12]]
    # Images one and three share their text.
    assert embedded == [[3, 1, 2, 9]]


def test_only_what_is_new_in_a_batch_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, selector = WatchedExecutor(monkeypatch), make_selector()
    known, embed = image_tokens(1, PLAN)
    new = image_tokens(2, PLANS[1])[0]
    first = selector.select([known], embed)
    again = selector.select([new, known, new], embed)
    assert backend.batches == [[12], [7]]
    assert again[1] is first[0]
    assert again[0] is again[2]


def test_a_tile_keeps_its_own_number() -> None:
    image, embed = image_tokens((1, 0), PLAN)
    (kept,) = make_selector().select([replace(image, num_kept=2)], embed)
    assert kept.tolist() == selected(make_selector(), replace(PLAN, num_kept=2))


def test_one_token_is_kept() -> None:
    assert selected(make_selector(), ImagePlan(num_tokens=1, num_kept=1, guidance=[3])) == [0]


@pytest.mark.parametrize("broken", ["vision", "keys"])
def test_features_that_are_not_numbers_keep_evenly_spaced_tokens(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    selector = make_selector()
    image, embed = image_tokens(1, PLAN)
    good, _ = image_tokens(2, PLAN, seed=2)
    getattr(image, broken)[3] = torch.nan
    with caplog.at_level(logging.WARNING):
        kept, unharmed = selector.select([image, good], embed)
        assert selector.select([image], embed)[0] is kept
    assert kept.tolist() == EVENLY_SPACED
    assert unharmed.tolist() == make_selector().select([good], embed)[0].tolist()
    assert (kept.dtype, num_fallbacks(selector)) == (torch.int64, 1)
    (line,) = caplog.messages
    assert "12 tokens (its features are not finite)" in line
    assert "5 evenly spaced tokens" in line


@pytest.mark.parametrize("num_pickable", [0, 4])
def test_too_few_pickable_tokens_keep_evenly_spaced_ones(num_pickable: int) -> None:
    selector = make_selector()
    assert selected(selector, replace(PLAN, excluded=torch.arange(12) >= num_pickable)) == EVENLY_SPACED
    assert num_fallbacks(selector) == 1


def test_an_image_that_cannot_be_selected_leaves_the_others_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = WatchedExecutor(monkeypatch)
    plans = [PLANS[0], replace(PLANS[2], excluded=torch.ones(20, dtype=torch.bool)), PLANS[1]]
    images = [image_tokens(key, plan)[0] for key, plan in enumerate(plans)]
    kept = make_selector().select(images, features(1)[2])
    assert backend.batches == [[12, 7]]
    assert kept[1].tolist() == [0, 6, 12, 19]


def test_a_backend_that_returns_too_few_tokens_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    few = torch.zeros(2, dtype=torch.int64)
    executor = SimpleNamespace(name="few", select=lambda _: [Selection(few, few, few, few.sum())])
    monkeypatch.setattr(selection, "make_executor", lambda *_: executor)
    assert selected(make_selector()) == EVENLY_SPACED


def test_one_images_error_is_its_own(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected = [selected(make_selector(), PLANS[0]), EVENLY_SPACED]
    backend = WatchedExecutor(monkeypatch, fails=lambda problem: len(problem.vision) == 20)
    selector = make_selector()
    image, embed = image_tokens(1, PLANS[0])
    with caplog.at_level(logging.WARNING):
        kept = selector.select([image, image_tokens(2, PLANS[2])[0]], embed)
    assert backend.batches == [[12, 20], [12], [20]]
    assert kept[0].tolist() == expected[0]
    assert kept[1].tolist() == [0, 6, 12, 19]
    assert num_fallbacks(selector) == 1
    assert "20 tokens (OutOfMemoryError: no memory); 4 evenly spaced tokens" in caplog.messages[0]


def no_memory(ids: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("no memory")


def test_guidance_that_there_is_no_memory_for() -> None:
    selector = make_selector()
    images = [image_tokens(key, PLAN)[0] for key in (1, 2)]
    assert [kept.tolist() for kept in selector.select(images, no_memory)] == [EVENLY_SPACED] * 2
    assert num_fallbacks(selector) == 2


def test_one_texts_length_is_not_anothers_loss(caplog: pytest.LogCaptureFixture) -> None:
    endless = [3] * 40
    images = [image_tokens(key, replace(PLAN, guidance=ids))[0] for key, ids in enumerate((PLAN.guidance, endless))]
    embed = image_tokens(0, PLAN)[1]
    selector = make_selector()
    with caplog.at_level(logging.WARNING):
        kept = selector.select(images, lambda ids: no_memory(ids) if len(ids) > 20 else embed(ids))
    assert [each.tolist() for each in kept] == [selected(make_selector(), key=0), EVENLY_SPACED]
    assert num_fallbacks(selector) == 1
    assert "no memory for the embeddings of 40 guidance tokens" in caplog.messages[0]


class TensorParallel:
    """This process as one of two ranks, where the first rank's indices are `first`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: list[int]) -> None:
        self.world_size, self.rank_in_group = 2, 1
        self._first = torch.tensor(first)
        monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
        monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(tp_group=self))

    def broadcast(self, indices: Tensor, src: int) -> Tensor:
        assert src == 0
        return indices.copy_(self._first)


def test_the_first_ranks_selection_stands_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a rank that had no memory for its own."""
    WatchedExecutor(monkeypatch, fails=lambda _: True)
    TensorParallel(monkeypatch, first=[1, 2, 3, 4, 5, 0, 1, 2])
    images = [image_tokens(key, plan)[0] for key, plan in enumerate(PLANS[:2])]
    kept = make_selector().select(images, features(1)[2])
    assert [indices.tolist() for indices in kept] == [[1, 2, 3, 4, 5], [0, 1, 2]]


def test_a_rank_does_not_leave_the_others_in_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    TensorParallel(monkeypatch, first=[])
    with pytest.raises(torch.OutOfMemoryError):
        make_selector().select([image_tokens(1, PLAN)[0]], no_memory)


@pytest.mark.parametrize(("num_tokens", "num_kept"), [(1, 1), (12, 1), (12, 11), (12, 12), (16384, 16374)])
def test_evenly_spaced_tokens_are_distinct_and_in_order(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, num_kept: int
) -> None:
    WatchedExecutor(monkeypatch, fails=lambda _: True)
    plan = ImagePlan(num_tokens, num_kept, [])
    image = ImageTokens(image_names(1), plan, torch.zeros(num_tokens, 1), torch.zeros(num_tokens, 1), num_kept)
    (kept,) = make_selector().select([image], torch.nn.Embedding(1, 1))
    assert len(kept) == num_kept
    assert kept[0] == 0
    assert kept[-1] < num_tokens
    assert bool((kept.diff() > 0).all())


def test_the_first_selection_stands_under_its_key() -> None:
    selector = make_selector()
    first = selected(selector, seed=0)
    assert selected(make_selector(), seed=1) != first
    assert selected(selector, seed=1) == first
    remembered = selector.remembered(key_of(1))
    assert remembered is not None
    assert remembered.tolist() == first
    assert selector.remembered(key_of(2)) is None


def test_what_was_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two selections of 5 tokens, each of them a block of the device's memory and an entry on the host.
    monkeypatch.setattr(selection, "MAX_SELECTION_BYTES", 2 * (512 + selection._ENTRY_BYTES))
    selector = make_selector()
    for key in (1, 2, 1, 3):
        selected(selector, key=key)
    assert [selector.remembered(key_of(key)) is not None for key in (1, 2, 3)] == [True, False, True]
    selected(selector, ImagePlan(80, 65, []), key=4)
    assert [selector.remembered(key_of(key)) is not None for key in (1, 2, 3, 4)] == [False, False, False, True]
    assert selector.size_bytes == 1024 + selection._ENTRY_BYTES


def test_after_a_flush_another_selection_may_be_made() -> None:
    selector = make_selector()
    first = selected(selector, seed=0)
    selector.clear()
    assert selected(selector, seed=1) == selected(make_selector(), seed=1) != first


def test_text_is_embedded_even_where_nothing_can_be_selected() -> None:
    # With tensor parallelism every rank takes part in the embedding, whatever its features are.
    embedded: list[Tensor] = []
    image, embed = image_tokens(1, PLAN)
    image.vision.mul_(torch.nan)

    def watched(ids: Tensor) -> Tensor:
        embedded.append(ids)
        rows: Tensor = embed(ids)
        return rows

    make_selector().select([image], watched)
    assert [ids.tolist() for ids in embedded] == [[3, 1, 2]]


def test_what_a_selection_did_is_known_without_waiting() -> None:
    selector = make_selector()
    assert selector.outcome(image_names(1).selection or b"") is None
    selected(selector)
    outcome = selector.outcome(image_names(1).selection or b"")
    assert outcome is not None
    vision, keys, embed = features(12)
    reference = select_tokens(vision, keys, embed(torch.tensor(PLAN.guidance)), 5, config=SETTINGS.config)
    assert (outcome.method, outcome.fallback) == ("mmtok", None)
    assert outcome.coverage == pytest.approx(float(reference.coverage[-1] / reference.total))
    bound = coverage_bound(reference.coverage, reference.total)
    assert outcome.coverage_bound == pytest.approx(float(bound / reference.total))
    assert selector.take_fallen() == []


def test_tiles_are_one_outcome() -> None:
    selector = make_selector()
    tiles = [replace(image_tokens(1, PLAN, seed=tile)[0], tile=tile) for tile in range(3)]
    tiles[1].vision.mul_(torch.nan)
    selector.select(tiles, features(1)[2])
    outcome = selector.outcome(image_names(1).selection or b"")
    assert outcome is not None
    assert (outcome.coverage, outcome.coverage_bound) == (None, None)
    assert outcome.fallback == "its features are not finite"


@pytest.mark.parametrize("method", ["random", "even", "divprune"])
def test_a_method_that_covers_nothing_has_no_coverage(method: MethodName) -> None:
    selector = make_selector()
    selected(selector, replace(PLAN, method=method))
    outcome = selector.outcome(image_names(1).selection or b"")
    assert outcome is not None
    assert (outcome.coverage, outcome.coverage_bound) == (None, None)


def test_tiles_share_one_coverage() -> None:
    selector = make_selector()
    tiles = [replace(image_tokens(1, PLAN, seed=tile)[0], tile=tile) for tile in range(3)]
    selector.select(tiles, features(1)[2])
    outcome = selector.outcome(image_names(1).selection or b"")
    assert outcome is not None
    # Drawn tokens of the second tile's features go by no coverage, and are told apart in one call.
    other = replace(image_tokens(2, replace(PLAN, method="random"), seed=1)[0])
    alone = [replace(tile, names=image_names(10 + number), tile=0) for number, tile in enumerate(tiles)]
    selector.select([alone[0], other, *alone[1:]], features(1)[2])
    each = [selector.outcome(image_names(10 + number).selection or b"") for number in range(3)]
    for name in ("coverage", "coverage_bound"):
        values = [getattr(one, name) for one in each]
        assert getattr(outcome, name) == pytest.approx(sum(values) / 3)
        assert len(set(values)) == 3


def test_what_is_covered_is_counted_by_family_and_method() -> None:
    labels = {"family": SETTINGS.family, "method": "text-coverage"}

    def counted(name: str) -> float:
        return REGISTRY.get_sample_value(f"mmtok:{name}", labels) or 0.0

    names = ("coverage_count", "coverage_sum", "coverage_bound_count", "coverage_bound_sum")
    before = [counted(name) for name in names]
    selector = make_selector()
    for _ in range(2):  # the second time it is remembered
        selected(selector, replace(PLAN, method="text-coverage"))
    outcome = selector.outcome(image_names(1).selection or b"")
    assert outcome is not None
    added = [counted(name) - then for name, then in zip(names, before, strict=True)]
    assert added == pytest.approx([1, outcome.coverage, 1, outcome.coverage_bound])


NAN_PLAN, TEXT_PLAN = PLAN, replace(PLAN, method="text-coverage", guidance=[])


@pytest.mark.parametrize("plan", [NAN_PLAN, TEXT_PLAN])
def test_a_selection_that_fell_back_is_reported_once_and_stands_for_those_under_way(plan: ImagePlan) -> None:
    selector = make_selector()
    image, embed = image_tokens(1, plan)
    if plan is NAN_PLAN:
        image.vision.mul_(torch.nan)
    (first,) = selector.select([image], embed)
    names = image.names
    # Its features are encoded again where they are what broke it, and another question about them is not touched else.
    assert selector.take_fallen() == list(names.bases if plan is NAN_PLAN else names.bases[1:])
    assert selector.take_fallen() == []
    # A request that is under way, or came before the flag, has the same tokens, and is flagged too.
    sound, _ = image_tokens(1, PLAN)
    (second,) = selector.select([sound], embed)
    assert second.tolist() == first.tolist() == EVENLY_SPACED
    outcome = selector.outcome(names.selection or b"")
    assert outcome is not None
    assert outcome.fallback is not None


def test_the_flag_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device a selection is not done when the call returns."""
    is_done = False
    clock = SimpleNamespace(stop=lambda: None, is_done=lambda: is_done, elapsed_ms=lambda: 1.0)
    monkeypatch.setattr(selection, "start_clock", lambda _: clock)
    selector = make_selector()
    image, embed = image_tokens(1, PLAN)
    image.vision.mul_(torch.nan)
    selector.select([image], embed)
    assert selector.take_fallen() == []
    outcome = selector.outcome(image.names.selection or b"")
    assert outcome is not None
    assert outcome.fallback is None
    is_done = True
    assert selector.take_fallen() == list(image.names.bases)
    outcome = selector.outcome(image.names.selection or b"")
    assert outcome is not None
    assert outcome.fallback == "its features are not finite"


@pytest.mark.slow
def test_200_000_selections_of_one_token_stay_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    selector, plan = make_selector(), replace(PLAN, num_kept=1)
    image, embed = image_tokens(1, plan)
    outcome = Outcome("mmtok")

    def select(images: Sequence[ImageTokens], _: object) -> list[selection._Remembered]:
        return [selection._Remembered(torch.zeros(1, dtype=torch.int64), replace(outcome)) for _ in images]

    # What is remembered is what counts here; selecting it would take minutes.
    monkeypatch.setattr(selector, "_select", select)
    before = resident_bytes()
    for start in range(0, 200_000, 100):
        numbers = range(start, start + 100)
        selector.select([replace(image, names=replace(image.names, selection=digest(each))) for each in numbers], embed)
        assert selector.size_bytes <= MAX_SELECTION_BYTES
    assert len(selector._kept) == MAX_SELECTION_BYTES // (selection._ENTRY_BYTES + 512)
    # On a device each has a block of 512 bytes besides, which is counted.
    assert resident_bytes() - before < MAX_SELECTION_BYTES
    assert collectors()["selections_remembered"]._value.get() == len(selector._kept)
    assert collectors()["selections_remembered_bytes"]._value.get() == selector.size_bytes
    selector.clear()
    assert collectors()["selections_remembered"]._value.get() == 0


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    ("family", "config", "types", "tokens"),
    [
        (
            "llava-1.5",
            SimpleNamespace(
                text_config=SimpleNamespace(hidden_size=64),
                vision_feature_layer=-2,
                vision_config=SimpleNamespace(hidden_size=32, image_size=336, patch_size=14),
            ),
            FeatureTypes(torch.bfloat16, torch.bfloat16, 64, 32),
            (576, 576),
        ),
        (
            "qwen2.5-vl",
            SimpleNamespace(vision_config=SimpleNamespace(hidden_size=32, out_hidden_size=64)),
            FeatureTypes(torch.bfloat16, torch.float32, 64, 32),
            (1, 16384),
        ),
        (
            "qwen3-vl",
            SimpleNamespace(vision_config=SimpleNamespace(hidden_size=32, out_hidden_size=64)),
            FeatureTypes(torch.bfloat16, torch.float32, 64, 32),
            (1, 16384),
        ),
    ],
)
def test_it_is_made_ready_for_the_models_features(
    family: str, config: object, types: FeatureTypes, tokens: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[tuple[FeatureTypes, tuple[int, int]]] = []
    monkeypatch.setattr(TorchExecutor, "prepare", lambda executor, *expected: prepared.append(expected))
    runner = SimpleNamespace(
        model=torch.nn.Linear(1, 1), model_config=SimpleNamespace(hf_config=config), dtype=torch.bfloat16
    )
    selector = TokenSelector(SETTINGS, SelectionMetrics(), FAMILIES[family].expected_features)
    selector.start_on(runner)
    assert prepared == [(types, tokens)]


@pytest.mark.parametrize(("method", "width"), [("mmtok", 64), ("text-coverage", 32)])
def test_it_is_made_ready_for_the_keys_that_the_server_compares(
    method: MethodName, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[FeatureTypes] = []
    monkeypatch.setattr(TorchExecutor, "prepare", lambda executor, types, tokens: prepared.append(types))
    config = SimpleNamespace(vision_config=SimpleNamespace(hidden_size=32, out_hidden_size=64))
    runner = SimpleNamespace(
        model=torch.nn.Linear(1, 1), model_config=SimpleNamespace(hf_config=config), dtype=torch.bfloat16
    )
    settings = replace(SETTINGS, keys="output", method=method)
    TokenSelector(settings, SelectionMetrics(), FAMILIES["qwen2.5-vl"].expected_features).start_on(runner)
    # A method that reads no keys is given those of the input.
    dtype = torch.bfloat16 if method == "mmtok" else torch.float32
    assert prepared == [FeatureTypes(torch.bfloat16, dtype, 64, width)]


def test_adapters_on_the_input_embedding_end_the_start() -> None:
    def runner(**adapters: object) -> SimpleNamespace:
        return SimpleNamespace(model=torch.nn.Linear(1, 1), **adapters)

    selector = TokenSelector(SETTINGS, SelectionMetrics())
    for harmless in ({}, {"lora_manager": None}, {"lora_manager": SimpleNamespace(embed_tokens_module=None)}):
        selector.start_on(runner(**harmless))
    with pytest.raises(ValueError, match="LoRA adapters on the input embedding"):
        selector.start_on(runner(lora_manager=SimpleNamespace(embed_tokens_module=torch.nn.Linear(1, 1))))
