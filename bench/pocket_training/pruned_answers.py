"""Answers to the pocket questions without a server: Hugging Face's model in this process, its images pruned by hand."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtok_bench.families import PocketFamily
from mmtok_bench.pocket import PICTURE_PX, pocket_checkpoint
from mmtok_bench.pocket.questions import AskedScene, fingerprint, make_scenes, picture_of
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.quality.plan import (
    METHODS_INSIDE,
    UNPRUNED,
    QualityPlan,
    ScoredAnswer,
    Setting,
    append_answers,
    method_by_input,
    read_answers,
    split_method,
)
from mmtok_bench.quality.rows import ALL_SEEDS, rows_of
from mmtok_bench.quality.scoring import max_words
from mmtok_bench.results import append_row
from mmtok_bench.selected_patches import EncodedImage, PatchSelector
from mmtok_deploy.auto_budget import AutoBudget, parse_budget, what_is_asked
from mmtok_deploy.methods import is_nested
from mmtok_deploy.repeated_tokens import share_of_distinct
from pocket_training.pruning_inside import last_hidden_after_fastv, last_hidden_after_sparsevlm

__all__ = ["PocketModel", "answer_all", "check_plan", "write_rows"]

_LAST_HIDDEN = {"fastv": last_hidden_after_fastv, "sparsevlm": last_hidden_after_sparsevlm}


class PocketModel:
    """A pocket model in float32 on the CPU.

    Args:
        family: The model's family.
        reads_pages: The model that reads pages, not the one that sees scenes.
    """

    def __init__(self, family: PocketFamily, *, reads_pages: bool = False) -> None:
        checkpoint = pocket_checkpoint(family, reads_pages=reads_pages)
        self.selector = PatchSelector(family, checkpoint)
        # "eager" gives the weights of attention, by which tokens are dropped inside the language model.
        self._model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._processor = AutoProcessor.from_pretrained(checkpoint)

    def read(self, picture: Image.Image, question: str) -> Any:
        """Returns the processor's inputs of a question about a picture, unpruned."""
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self._processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        return self._processor(text=[prompt], images=[picture], return_tensors="pt")

    @torch.inference_mode()
    def answer(
        self, inputs: Any, encoded: EncodedImage, kept: Tensor, num_words: int, inside: tuple[str, int] | None = None
    ) -> str:
        """Returns the answer that the model gives when it reads only the kept tokens of a picture.

        Qwen2.5-VL reads each token at its position in the unpruned prompt, LLaVA-1.5 at its position in the pruned one.

        Args:
            inputs: Result of `read`.
            encoded: Result of `selector.encode`.
            kept: [K] int64, the kept tokens in raster order.
            num_words: The largest number of tokens of the answer.
            inside: One of `METHODS_INSIDE` and the number of image tokens that the last layers read; None to read all.
        """
        (ids,) = inputs["input_ids"]
        start = int((ids == self._model.config.image_token_id).nonzero()[0])
        embed = self._model.get_input_embeddings()
        behind = ids[start + len(encoded.vision) :]
        rows = torch.cat([embed(ids[:start]), encoded.vision[kept], embed(behind)])
        places = torch.cat([torch.arange(start), start + kept, torch.arange(len(ids) - len(behind), len(ids))])
        positions, later = self._positions(inputs, places)
        image, num_prompt = slice(start, start + len(kept)), len(rows)
        said: list[int] = []
        for _ in range(num_words):
            hidden = self._last_hidden(rows, positions, image, inside, num_prompt)
            token = int(self._model.lm_head(hidden).argmax())
            if token == self._processor.tokenizer.eos_token_id:
                break
            rows = torch.cat([rows, embed(torch.tensor([token]))])
            positions = torch.cat([positions, torch.full_like(positions[..., :1], later + len(said))], dim=-1)
            said.append(token)
        text: str = self._processor.tokenizer.decode(said)
        return text

    def _last_hidden(
        self, rows: Tensor, positions: Tensor, image: slice, inside: tuple[str, int] | None, num_prompt: int
    ) -> Tensor:
        language_model = self._model.model.language_model
        if inside is not None:
            method, num_kept = inside
            return _LAST_HIDDEN[method](language_model, rows, positions, image, num_kept, num_prompt)
        hidden: Tensor = language_model(inputs_embeds=rows[None], position_ids=positions).last_hidden_state[0, -1]
        return hidden

    def _positions(self, inputs: Any, places: Tensor) -> tuple[Tensor, int]:
        """Returns the positions of the tokens at these places, and that of the next token."""
        if "image_grid_thw" not in inputs:
            return torch.arange(len(places))[None], len(places)
        arguments = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids") if name in inputs}
        positions, _ = self._model.model.get_rope_index(inputs["input_ids"], **arguments)
        return positions[..., places], int(positions.max()) + 1


def check_plan(family: PocketFamily, plan: QualityPlan) -> None:
    """Checks that a plan can be answered in this process, before a model is loaded.

    Raises:
        ValueError: A budget of smaller images, the method with an agent, one that the family cannot run or that makes
            images smaller, or questions about pages to a family without a model that reads them.
    """
    plan.check_family(family)
    pocket_checkpoint(family, reads_pages=plan.is_about_pages)
    for budget in plan.budgets:
        parse_budget(budget, AutoBudget())
    for method in plan.methods:
        if method == "downsample":
            raise ValueError("downsample makes images smaller, which a server does: mmtok quality --methods downsample")
        if method not in METHODS_INSIDE:
            split_method(method)


def answer_all(family: PocketFamily, plan: QualityPlan, answers: Path) -> None:
    """Writes the answers of each method at each budget to the questions of each seed, as `mmtok quality` does.

    Args:
        family: The pocket model's.
        plan: One that `check_plan` lets through.
        answers: The file that they are added to.
    """
    model = PocketModel(family, reads_pages=plan.is_about_pages)
    for seed in plan.seeds:
        scenes = make_scenes(seed, plan.num_questions, plan.kinds)
        question_set = fingerprint(scenes)
        given = [
            each
            for scene in scenes
            for each in _answers(model, scene, plan, PICTURE_PX.get(family, SCENE_PX), question_set)
        ]
        for setting in plan.pairs():
            append_answers(answers, (each for each in given if (each.method, each.budget) == setting))


def write_rows(family: PocketFamily, plan: QualityPlan, answers: Path, rows: Path) -> None:
    """Writes the scores of a plan's answers over all of its seeds: a row for each kind, method and budget.

    Raises:
        ValueError: A line that is no answer.
    """
    found: dict[tuple[str, str], list[ScoredAnswer]] = {pair: [] for pair in plan.pairs()}
    settings = set(plan.settings())
    for setting, given in read_answers(answers).items():
        # Earlier runs may have added answers of other settings.
        if setting in settings:
            found[setting.method, setting.budget] += given
    question_set = fingerprint(
        [scene for seed in plan.seeds for scene in make_scenes(seed, plan.num_questions, plan.kinds)]
    )
    seed = ALL_SEEDS if len(plan.seeds) > 1 else plan.seeds[0]
    for (method, budget), given in found.items():
        for row in rows_of(
            *(given, found.get((UNPRUNED, "all"), []), found.get((method_by_input(method) or "", budget), [])),
            model=f"pocket {pocket_checkpoint(family, reads_pages=plan.is_about_pages).name}",
            seed=seed,
            question_set=question_set,
            device=torch.device("cpu"),
            backend="transformers",
        ):
            append_row(rows, row)


def _answers(
    model: PocketModel, asked: AskedScene, plan: QualityPlan, side_px: int, question_set: str
) -> Iterator[ScoredAnswer]:
    picture = picture_of(asked.scene, side_px)
    encoded = model.selector.encode(picture)
    distinct = share_of_distinct(picture, len(encoded.vision))
    for number, question in enumerate(asked.questions):
        inputs = model.read(picture, question.text)
        for pair, kept, inside in _kept(model, encoded, distinct, question.text, plan):
            said = model.answer(inputs, encoded, kept, max_words(question), inside)
            num_kept = len(kept) if inside is None else inside[1]
            measured = {"num_prompt_tokens": 0, "latency_ms": 0.0, "cell_s": 0.0, "question_set": question_set}
            setting = Setting(*pair, asked.seed)
            yield ScoredAnswer.to_question(setting, asked, number, said, num_image_tokens=num_kept, **measured)


def _kept(
    model: PocketModel, encoded: EncodedImage, distinct: Fraction, question: str, plan: QualityPlan
) -> Iterator[tuple[tuple[str, str], Tensor, tuple[str, int] | None]]:
    """Yields each method and budget of a plan, the image tokens that the language model reads, and what it drops.

    The tokens are [K] int64 in raster order. The last is a method of `METHODS_INSIDE` and the number of tokens that it
    keeps; None for other methods.
    """
    budgets = {text: parse_budget(text, AutoBudget()) for text in plan.budgets}
    asks, num_tokens = what_is_asked(question), len(encoded.vision)
    nums_kept = {
        text: (budget.of(asks, distinct) if isinstance(budget, AutoBudget) else budget).num_kept(num_tokens)
        for text, budget in budgets.items()
    }
    orders: dict[str, Tensor] = {}
    for name, budget in plan.pairs():
        if name in (UNPRUNED, *METHODS_INSIDE):
            inside = (name, nums_kept[budget]) if name in METHODS_INSIDE else None
            yield (name, budget), torch.arange(num_tokens), inside
            continue
        method, keys = split_method(name)
        if name not in orders or not is_nested(method):
            # Nested budgets: the first picks of the largest one are those of every other.
            most = max(nums_kept[text] for of, text in plan.pairs() if of == name)
            num_picks = most if is_nested(method) else nums_kept[budget]
            orders[name] = model.selector.select(encoded, model.selector.embed(question), num_picks, method, keys).order
        yield (name, budget), orders[name][: nums_kept[budget]].sort().values, None
