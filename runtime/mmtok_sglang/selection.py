"""Picking the tokens of a prefill batch's images in the scheduler process, right after the vision encoder."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmtok_deploy.backends.triton_plan import FeatureTypes
from mmtok_deploy.config import KeySource
from mmtok_deploy.coverage import coverage_bound
from mmtok_deploy.executors import EngineExecutor, Executor, make_executor
from mmtok_deploy.methods import MethodName, comparator, coverage_of
from mmtok_deploy.methods.evenly_spaced import evenly_spaced
from mmtok_deploy.problem import Selection, SelectionProblem
from mmtok_sglang.cache_key import ImageKeys, digest
from mmtok_sglang.memory import MAX_SELECTION_BYTES, allocated_bytes
from mmtok_sglang.metrics import NOT_FINITE, SelectionMetrics, count_triton_compiles, start_clock
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.ranks import is_first_rank, num_ranks, of_first_rank
from mmtok_sglang.settings import Settings

__all__ = ["ExpectedFeatures", "ImageTokens", "Outcome", "TokenSelector", "without_non_finite"]

logger = logging.getLogger(__name__)

# What an entry takes on the host: key, outcome, the object of a tensor. Measured 940 (resident memory, PyTorch 2.14.1).
_ENTRY_BYTES = 1000


@dataclass(slots=True)
class Outcome:
    """What a selection did, as far as the host knows; filled in when the device is done.

    Args:
        method: What was asked to choose the tokens.
        fallback: Why evenly spaced tokens were kept in their place; None if they were not, or it is not known yet.
        coverage: What the kept tokens cover, as a share of what all N tokens together cover; None for a method that
            does not go by coverage, a fallback, and before it is known.
        coverage_bound: No set of as many tokens covers a larger share; None where `coverage` is.
    """

    method: MethodName
    fallback: str | None = None
    coverage: float | None = None
    coverage_bound: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImageTokens:
    """The tokens of one image, or of one tile, to select from.

    Args:
        names: The image's keys.
        plan: The image's plan.
        vision: [N, D] tokens after the projector.
        keys: [N, d] features by which they are compared: those before it, or `vision`.
        num_kept: K, the tokens to keep of these.
        attention: [N] what the encoder pays to each token, where the plan's method goes by it.
        tile: The tile's number; 0 for an image in one piece.
    """

    names: ImageKeys
    plan: ImagePlan
    vision: Tensor
    keys: Tensor
    num_kept: int
    attention: Tensor | None = None
    tile: int = 0

    @property
    def key(self) -> tuple[bytes | None, int]:
        """What the selection is remembered by."""
        return self.names.selection, self.tile

    @property
    def seed(self) -> int:
        """The same wherever and whenever this image is selected from with this plan, and another for each question."""
        return int.from_bytes(digest(self.plan.seed, self.names.draw, self.tile)[:7], "big")


@dataclass(frozen=True, slots=True)
class _Remembered:
    kept: Tensor
    outcome: Outcome

    @property
    def size_bytes(self) -> int:
        return allocated_bytes(self.kept) + _ENTRY_BYTES


class ExpectedFeatures(NamedTuple):
    """What a server selects from.

    Args:
        types: Dtypes and widths.
        tokens: The fewest and the most tokens of an image or tile.
    """

    types: FeatureTypes
    tokens: tuple[int, int]


class TokenSelector:
    """Selects the kept tokens of images and remembers them by the image's cache key; one a scheduler process.

    A key's first selection stands while it is remembered: an image encoded again in the middle of its own prefill,
    in another batch and so with other rounding, must keep the same tokens. That holds for evenly spaced tokens that
    took the place of a selection, too; but their key is reported to `take_fallen`, so that no new request gets it.

    Args:
        settings: The server's.
        metrics: What it counts.
        expected: Returns what is selected from, given the model's Hugging Face configuration, its dtype and the side of
            the projector that keys are taken from; None prepares for nothing.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: SelectionMetrics,
        expected: Callable[[Any, torch.dtype, KeySource], ExpectedFeatures] | None = None,
    ) -> None:
        self._settings = settings
        self._expected = expected
        self._executor: Executor | None = None
        self._metrics = metrics
        self._kept: OrderedDict[tuple[bytes | None, int], _Remembered] = OrderedDict()
        self._fallen: list[tuple[bytes, int]] = []
        self.size_bytes = 0

    def start_on(self, model_runner: Any) -> None:
        """Makes what runs the selection, for a model that is loaded: what cannot run ends the server here.

        Raises:
            ValueError: Adapters change the input embedding. SGLang applies those of the batch that runs, by its
                tokens; guidance is embedded for images of several requests, not as a batch's tokens.
        """
        adapters = getattr(model_runner, "lora_manager", None)
        if adapters is not None and adapters.embed_tokens_module is not None:
            raise ValueError(
                "--mmtok-budget cannot be combined with LoRA adapters on the input embedding (embed_tokens): guidance "
                "would be embedded by another request's adapter. Leave embed_tokens out of --lora-target-modules, and "
                "serve no adapter that has it"
            )
        device = next(model_runner.model.parameters()).device
        expected = None
        if self._expected is not None:
            config = model_runner.model_config.hf_config
            expected = self._expected(config, model_runner.dtype, self._settings.executor_keys)
        self.start(device, expected)
        if device.type == "cuda" and is_first_rank():
            count_triton_compiles()

    def start(self, device: torch.device, expected: ExpectedFeatures | None = None) -> None:
        """Makes what runs the selection; holds an exported file against the reference once.

        Args:
            device: Where the features will be.
            expected: What they will be: all that they need is compiled here, before any request waits for it.

        Raises:
            ArtifactError: The exported file is not whole.
            EngineError: It cannot run on the device.
        """
        settings = self._settings
        executor = make_executor(
            settings.backend,
            device,
            settings.executor_config,
            settings.engine,
            settings.onnxruntime_provider,
            settings.engine_sha256,
        )
        if isinstance(executor, EngineExecutor):
            executor.check()
        elif expected is not None:
            executor.prepare(*expected)
        self._executor = executor
        logger.info("MMTok: tokens are selected by %s", executor.name)

    def select(self, images: Sequence[ImageTokens], embed: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Returns the kept tokens of each image in raster order, [K] int64 on the features' device.

        All of them are selected in one call, and nothing here waits for the device. A selection that cannot be made
        (NaN features, every token excluded, no memory) never takes the scheduler down: evenly spaced tokens take its
        place, with a log line and a count.

        Args:
            images: The images of a prefill batch: sglang 0.5.23 srt/managers/mm_schedule.py
                `_batch_encode_per_image_misses` asks once for all requests' images whose embeddings it does not hold
                (on ROCm, NPU and XPU `_get_chunked_embedding_by_item` once a request).
            embed: The language model's input embedding.
        """
        new: dict[tuple[bytes | None, int], ImageTokens] = {}
        for image in images:
            if image.key not in self._kept:
                new.setdefault(image.key, image)
        if new:
            selected = self._select(list(new.values()), embed)
            self._kept.update(zip(new, selected, strict=True))
            self.size_bytes += sum(each.size_bytes for each in selected)
        for image in images:
            self._kept.move_to_end(image.key)
        kept = [self._kept[image.key].kept for image in images]
        while self.size_bytes > MAX_SELECTION_BYTES:
            self.size_bytes -= self._kept.popitem(last=False)[1].size_bytes
        self._metrics.set_remembered(len(self._kept), self.size_bytes)
        return kept

    def remembered(self, key: tuple[bytes | None, int]) -> Tensor | None:
        """Returns the selection under `key`, None if there is none (any more)."""
        found = self._kept.get(key)
        return None if found is None else found.kept

    def outcome(self, selection: bytes) -> Outcome | None:
        """Returns what the selection of an image did, None if it is not remembered (any more). Nothing is waited for.

        A request that took the image's tokens from a cache has the outcome of the request that put them there.

        Args:
            selection: `keys_of(item).selection`.
        """
        self._metrics.settle()
        tiles: list[Outcome] = []
        while (found := self._kept.get((selection, len(tiles)))) is not None:
            tiles.append(found.outcome)
        if not tiles:
            return None
        return Outcome(
            tiles[0].method,
            next((tile.fallback for tile in tiles if tile.fallback is not None), None),
            _mean([tile.coverage for tile in tiles]),
            _mean([tile.coverage_bound for tile in tiles]),
        )

    def take_fallen(self) -> list[tuple[bytes, int]]:
        """Returns the keys (`ImageKeys.bases`) under which evenly spaced tokens took the place of a selection.

        Each is returned once, as soon as the host knows of it. Nothing is waited for.
        """
        self._metrics.settle()
        fallen, self._fallen = self._fallen, []
        return fallen

    def clear(self) -> None:
        """Forgets every selection; only while no request runs, whose images must keep their tokens."""
        self._kept.clear()
        self.size_bytes = 0
        self._metrics.set_remembered(0, 0)

    def _select(self, images: Sequence[ImageTokens], embed: Callable[[Tensor], Tensor]) -> list[_Remembered]:
        clock = start_clock(images[0].vision.device)
        outcomes = [Outcome(image.plan.method) for image in images]
        # Images of one turn share their text.
        texts = _embed_guidance(list({tuple(image.plan.guidance): None for image in images}), images[0].vision, embed)
        selections = self._run(images, [texts[tuple(image.plan.guidance)] for image in images], outcomes)
        kept: list[Tensor] = []
        is_finite: list[Tensor] = []
        made: dict[int, Selection] = {}
        for place, (image, selection) in enumerate(zip(images, selections, strict=True)):
            indices = evenly_spaced(len(image.vision), image.num_kept, image.vision.device)
            if selection is None:
                # The features may be sound: another selection from them may be made.
                self._fallen.append(image.names.bases[1])
            else:
                # Decided on the device: the host would have to wait for the features' values.
                is_finite.append(torch.isfinite(selection.total))
                indices = torch.where(is_finite[-1], selection.kept, indices)
                made[place] = selection
            kept.append(indices)
        if made:
            curves = _curves_on_host(made, outcomes)
            told = [(images[place].names, outcomes[place], curves.get(place)) for place in made]
            sizes = [(len(images[place].vision), images[place].num_kept) for place in made]

            def tell(flags: Sequence[bool]) -> None:
                for (names, outcome, curve), flag in zip(told, flags, strict=True):
                    self._tell(names, outcome, flag, curve)

            self._metrics.count_call(clock, sizes, torch.stack(is_finite), tell)
        return [_Remembered(*each) for each in zip(of_first_rank(kept), outcomes, strict=True)]

    def _tell(self, names: ImageKeys, outcome: Outcome, is_finite: bool, curve: Tensor | None) -> None:
        """Fills in what the device has found out; `curve` is an element of `_curves_on_host`."""
        if not is_finite:
            outcome.fallback = NOT_FINITE
            # Whatever broke the features, they are encoded again.
            self._fallen += names.bases
        elif curve is not None:
            shares = curve[:-1] / curve[-1]
            # Both are rounded, and may be equal.
            outcome.coverage = min(1.0, float(shares[-1]))
            outcome.coverage_bound = float(coverage_bound(shares, shares.new_ones(())))
            self._metrics.count_coverage(
                self._settings.family, outcome.method, outcome.coverage, outcome.coverage_bound
            )

    def _fall_back(self, outcome: Outcome, num_tokens: int, num_kept: int, why: str) -> None:
        outcome.fallback = why
        self._metrics.count_fallback(num_tokens, num_kept, why)

    def _run(
        self, images: Sequence[ImageTokens], texts: Sequence[Tensor | None], outcomes: Sequence[Outcome]
    ) -> list[Selection | None]:
        """Returns each image's selection, None where it cannot be made, which its outcome says."""
        problems: dict[int, SelectionProblem] = {}
        for place, (image, text) in enumerate(zip(images, texts, strict=True)):
            if text is None:
                why = f"no memory for the embeddings of {len(image.plan.guidance)} guidance tokens"
                self._fall_back(outcomes[place], len(image.vision), image.num_kept, why)
                continue
            obstacle = self._obstacle(image, text)
            if obstacle is None:
                excluded = image.plan.excluded
                if excluded is not None:
                    excluded = excluded.to(image.vision.device, non_blocking=True)
                problems[place] = SelectionProblem(
                    *(image.vision, image.keys, text, image.num_kept, excluded),
                    *(image.attention, image.seed, image.plan.num_frames // image.plan.num_parts),
                )
            else:
                self._fall_back(outcomes[place], len(image.vision), image.num_kept, obstacle)
        made: dict[int, Selection | None] = {}
        # Keys of one width together.
        kinds = {place: (images[place].plan.method, images[place].plan.keys) for place in problems}
        for kind in dict.fromkeys(kinds.values()):
            places = [place for place in problems if kinds[place] == kind]
            selections = self._run_method(
                *kind, [problems[place] for place in places], [outcomes[place] for place in places]
            )
            made.update(zip(places, selections, strict=True))
        return [made.get(place) for place in range(len(images))]

    def _obstacle(self, image: ImageTokens, text: Tensor) -> str | None:
        """Returns why no selection can be made, as far as the host knows; the plan's mask is on the host."""
        excluded = image.plan.excluded
        num_pickable = len(image.vision) - (0 if excluded is None else int(excluded.sum()))
        if num_pickable < image.num_kept:
            return f"only {num_pickable} of {image.num_kept} tokens may be picked"
        if coverage_of(image.plan.method) == "text" and not len(text):
            return "text coverage without guidance"
        return None

    def _run_method(
        self,
        method: MethodName,
        keys: KeySource,
        problems: Sequence[SelectionProblem],
        outcomes: Sequence[Outcome],
    ) -> list[Selection | None]:
        """Returns each problem's selection from one call; if that fails, from one call each, None where that fails."""
        if self._executor is None:
            raise RuntimeError("MMTok: an image is to be pruned before the model is loaded")
        try:
            if method == self._settings.executor_method and keys == self._settings.executor_keys:
                selections = self._executor.select(problems)
            else:
                selections = comparator(method)(problems, self._settings.config)
            if [len(selection) for selection in selections] != [problem.num_picks for problem in problems]:
                raise RuntimeError("the backend returned another number of tokens than asked for")
            return list(selections)
        except Exception as error:  # whatever it is, it may be one image's; the server has others
            why = f"{type(error).__name__}: {error}"
        # After the handler, to whose end the error holds the memory of the call that failed.
        if len(problems) > 1:
            return [
                self._run_method(method, keys, [problem], [outcome])[0]
                for problem, outcome in zip(problems, outcomes, strict=True)
            ]
        self._fall_back(outcomes[0], len(problems[0].vision), problems[0].num_picks, why)
        return [None]


def _curves_on_host(selections: Mapping[int, Selection], outcomes: Sequence[Outcome]) -> dict[int, Tensor]:
    """Returns coverage after each pick, then that of all tokens, [K + 1], of each selection that goes by coverage.

    They are on the host, from one copy; on CUDA not yet valid when this returns, as nothing waits.
    """
    places = [place for place in selections if coverage_of(outcomes[place].method) is not None]
    if not places:
        return {}
    values = [value for place in places for value in (selections[place].coverage, selections[place].total[None])]
    on_host = torch.cat(values).to("cpu", non_blocking=values[0].is_cuda)
    return dict(zip(places, on_host.split([len(selections[place]) + 1 for place in places]), strict=True))


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean of an image's tiles, None where one of them has no value."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def without_non_finite(rows: Tensor) -> Tensor:
    """Returns kept tokens [K, D] with zeros for values that are not finite; all others keep their bits.

    Attention multiplies values that a query must not see by zero, and NaN times zero is NaN: an image's NaN would reach
    the text before it, which the prefix cache shares with other requests.
    """
    return rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _embed_guidance(
    texts: Sequence[tuple[int, ...]], vision: Tensor, embed: Callable[[Tensor], Tensor]
) -> dict[tuple[int, ...], Tensor | None]:
    """Returns the [M, D] embeddings of each text of M token ids, from one call; None where there is no memory for it.

    Without the memory for all, each is embedded by itself: one request's long text is not another's loss.
    """
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    try:
        rows = embed(ids.to(vision.device, non_blocking=True)) if len(ids) else vision.new_empty(0, vision.shape[1])
        return dict(zip(texts, rows.split([len(text) for text in texts]), strict=True))
    except Exception:  # whatever it is, a selection that cannot be made has a substitute
        if num_ranks() > 1:
            # The other ranks are in the embedding's collective; going on would pair it with another one.
            raise
    # After the handler, to whose end the error holds the memory of the call that failed.
    if len(texts) == 1:
        return {texts[0]: None}
    return {text: rows for each in texts for text, rows in _embed_guidance([each], vision, embed).items()}
