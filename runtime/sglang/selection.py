"""Picking the tokens of a prefill batch's images in the scheduler process, right after the vision encoder."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtok_deploy.methods import MethodName, comparator, coverage_of
from mmtok_deploy.methods.evenly_spaced import evenly_spaced
from mmtok_deploy.problem import Selection, SelectionProblem
from mmtok_deploy.runtime.executors import EngineExecutor, Executor, make_executor
from mmtok_deploy.runtime.sglang.metrics import SelectionMetrics, start_clock
from mmtok_deploy.runtime.sglang.placeholders import ImagePlan
from mmtok_deploy.runtime.sglang.ranks import num_ranks, of_first_rank
from mmtok_deploy.runtime.sglang.settings import Settings

__all__ = ["ImageTokens", "TokenSelector"]

logger = logging.getLogger(__name__)

# Of remembered selections, 8 bytes a kept token: of more tokens than a KV cache holds, and so of every running request;
# SGLang's own cache of embeddings (100 MB by default) holds far fewer images.
_MAX_REMEMBERED_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, eq=False)
class ImageTokens:
    """The tokens of one image, or of one tile, to select from.

    Args:
        key: What to remember the selection by.
        plan: The image's plan.
        vision: [N, D] tokens after the projector.
        keys: [N, d] features before it.
        num_kept: K, the tokens to keep of these.
        attention: [N] what the encoder pays to each token, where the plan's method goes by it.
    """

    key: object
    plan: ImagePlan
    vision: Tensor
    keys: Tensor
    num_kept: int
    attention: Tensor | None = None

    @property
    def seed(self) -> int:
        """The same wherever and whenever this image is selected from with this plan, and another for each question."""
        drawn_by = repr((self.plan.seed, self.key)).encode()
        return int.from_bytes(hashlib.sha256(drawn_by).digest()[:7], "big")


class TokenSelector:
    """Selects the kept tokens of images and remembers them by the image's cache key; one a scheduler process.

    A key's first selection stands while it is remembered: an image encoded again in the middle of its own prefill,
    in another batch and so with other rounding, must not change its mind about which tokens it keeps.
    """

    def __init__(self, settings: Settings, metrics: SelectionMetrics) -> None:
        self._settings = settings
        self._executor: Executor | None = None
        self._metrics = metrics
        self._kept: OrderedDict[object, Tensor] = OrderedDict()
        self._kept_bytes = 0

    def init_model_worker(self, original: Callable[..., None], scheduler: Any) -> None:
        """Makes what runs the selection as soon as the model is on its device: what cannot run ends the server here.

        Hooks: sglang 0.5.23 srt/managers/scheduler.py Scheduler.init_model_worker. Can go when SGLang calls plugins
        once the model is loaded.
        """
        original(scheduler)
        self.start(next(scheduler.tp_worker.model_runner.model.parameters()).device)

    def start(self, device: torch.device) -> None:
        """Makes what runs the selection, and holds an exported file against the reference once.

        Raises:
            ArtifactError: The exported file is not whole.
            EngineError: It cannot run on the device.
        """
        settings = self._settings
        self._executor = make_executor(
            *(settings.backend, device, settings.config, settings.engine, settings.provider, settings.engine_sha256)
        )
        if isinstance(self._executor, EngineExecutor):
            self._executor.check()
        logger.info("MMTok: tokens are selected by %s", self._executor.name)

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
        new: dict[object, ImageTokens] = {}
        for image in images:
            if image.key not in self._kept:
                new.setdefault(image.key, image)
        if new:
            selected = self._select(list(new.values()), embed)
            self._kept.update(zip(new, selected, strict=True))
            self._kept_bytes += sum(kept.nbytes for kept in selected)
        for image in images:
            self._kept.move_to_end(image.key)
        kept = [self._kept[image.key] for image in images]
        while self._kept_bytes > _MAX_REMEMBERED_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return kept

    def remembered(self, key: object) -> Tensor | None:
        """Returns the selection under `key`, None if there is none (any more)."""
        return self._kept.get(key)

    def clear(self) -> None:
        """Forgets every selection; only while no request runs, whose images must not change their mind."""
        self._kept.clear()
        self._kept_bytes = 0

    def _select(self, images: Sequence[ImageTokens], embed: Callable[[Tensor], Tensor]) -> list[Tensor]:
        clock = start_clock(images[0].vision.device)
        # Images of one turn share their text.
        texts = _embed_guidance(list({tuple(image.plan.guidance): None for image in images}), images[0].vision, embed)
        selections = self._run(images, [texts[tuple(image.plan.guidance)] for image in images])
        kept, made, is_finite = [], [], []
        for image, selection in zip(images, selections, strict=True):
            indices = evenly_spaced(len(image.vision), image.num_kept, image.vision.device)
            if selection is not None:
                # Decided on the device: the host would have to wait for the features' values.
                is_finite.append(torch.isfinite(selection.total))
                indices = torch.where(is_finite[-1], selection.kept, indices)
                made.append((len(image.vision), image.num_kept))
            kept.append(indices)
        if made:
            self._metrics.count_call(clock, made, torch.stack(is_finite))
        return of_first_rank(kept)

    def _run(self, images: Sequence[ImageTokens], texts: Sequence[Tensor | None]) -> list[Selection | None]:
        """Returns each image's selection, None where it cannot be made."""
        problems: dict[int, SelectionProblem] = {}
        for place, (image, text) in enumerate(zip(images, texts, strict=True)):
            if text is None:
                why = f"no memory for the embeddings of {len(image.plan.guidance)} guidance tokens"
                self._metrics.count_fallback(len(image.vision), image.num_kept, why)
                continue
            obstacle = self._obstacle(image, text)
            if obstacle is None:
                excluded = image.plan.excluded
                if excluded is not None:
                    excluded = excluded.to(image.vision.device, non_blocking=True)
                problems[place] = SelectionProblem(
                    *(image.vision, image.keys, text, image.num_kept, excluded), image.attention, image.seed
                )
            else:
                self._metrics.count_fallback(len(image.vision), image.num_kept, obstacle)
        made: dict[int, Selection | None] = {}
        for method in {images[place].plan.method: None for place in problems}:
            places = [place for place in problems if images[place].plan.method == method]
            made.update(zip(places, self._run_method(method, [problems[place] for place in places]), strict=True))
        return [made.get(place) for place in range(len(images))]

    def _obstacle(self, image: ImageTokens, text: Tensor) -> str | None:
        """Returns why no selection can be made, as far as the host knows; the plan's mask is on the host."""
        excluded = image.plan.excluded
        num_pickable = len(image.vision) - (0 if excluded is None else int(excluded.sum()))
        if num_pickable < image.num_kept:
            return f"only {num_pickable} of {image.num_kept} tokens may be picked"
        if coverage_of(image.plan.method, self._settings.config) == "text" and not len(text):
            return "text coverage without guidance"
        return None

    def _run_method(self, method: MethodName, problems: Sequence[SelectionProblem]) -> list[Selection | None]:
        """Returns each problem's selection from one call; if that fails, from one call each, None where that fails."""
        if self._executor is None:
            raise RuntimeError("MMTok: an image is to be pruned before the model is loaded")
        try:
            if method == "mmtok":
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
            return [self._run_method(method, [problem])[0] for problem in problems]
        self._metrics.count_fallback(len(problems[0].vision), problems[0].num_picks, why)
        return [None]


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
