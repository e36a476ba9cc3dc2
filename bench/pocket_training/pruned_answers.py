"""Answers to the pocket questions without a server: Hugging Face's model in this process, its images pruned by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtok_bench.families import PocketFamily
from mmtok_bench.pocket import PICTURE_PX, pocket_checkpoint
from mmtok_bench.pocket.questions import AskedScene, Question, fingerprint, make_scenes, picture_of
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.quality.plan import ScoredAnswer, append_answers
from mmtok_bench.quality.scoring import is_right, normalise
from mmtok_bench.selected_patches import EncodedImage, PatchSelector
from mmtok_deploy.auto_budget import AutoBudget, parse_budget, what_is_asked
from mmtok_deploy.budget import Budget

__all__ = ["PocketModel", "answer_all"]


class PocketModel:
    """A pocket model in float32 on the CPU."""

    def __init__(self, family: PocketFamily) -> None:
        checkpoint = pocket_checkpoint(family)
        self.selector = PatchSelector(family, checkpoint)
        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(checkpoint)

    @torch.inference_mode()
    def answer(self, picture: Image.Image, encoded: EncodedImage, question: str, num_kept: int, num_words: int) -> str:
        """Returns the answer from `num_kept` tokens of the picture, each at the position that it has unpruned.

        LLaVA-1.5 counts the positions of its prompt: there they run on.

        Args:
            picture: As it is sent.
            encoded: What `selector.encode` makes of it.
            question: About it.
            num_kept: Tokens that MMTok keeps, with the family's preset.
            num_words: The most tokens of the answer.
        """
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self._processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = self._processor(text=[prompt], images=[picture], return_tensors="pt")
        (ids,) = inputs["input_ids"]
        start = int((ids == self._model.config.image_token_id).nonzero()[0])
        kept = self.selector.select(encoded, self.selector.embed(question), num_kept).kept
        embed = self._model.get_input_embeddings()
        behind = ids[start + len(encoded.vision) :]
        rows = torch.cat([embed(ids[:start]), encoded.vision[kept], embed(behind)])
        places = torch.cat([torch.arange(start), start + kept, torch.arange(len(ids) - len(behind), len(ids))])
        positions, later = self._positions(inputs, places)
        said: list[int] = []
        for _ in range(num_words):
            hidden = self._model.model.language_model(inputs_embeds=rows[None], position_ids=positions)
            token = int(self._model.lm_head(hidden.last_hidden_state[0, -1]).argmax())
            if token == self._processor.tokenizer.eos_token_id:
                break
            rows = torch.cat([rows, embed(torch.tensor([token]))])
            positions = torch.cat([positions, torch.full_like(positions[..., :1], later + len(said))], dim=-1)
            said.append(token)
        text: str = self._processor.tokenizer.decode(said)
        return text

    def _positions(self, inputs: Any, places: Tensor) -> tuple[Tensor, int]:
        """Returns the positions of the tokens at these places, and that of the next token."""
        if "image_grid_thw" not in inputs:
            return torch.arange(len(places))[None], len(places)
        arguments = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids") if name in inputs}
        positions, _ = self._model.model.get_rope_index(inputs["input_ids"], **arguments)
        return positions[..., places], int(positions.max()) + 1


def answer_all(
    family: PocketFamily, budgets: Sequence[str], seeds: Sequence[int], num_questions: int, answers: Path
) -> None:
    """Writes the answers of MMTok at each budget to the questions of each seed, as `mmtok quality` does.

    Raises:
        ValueError: A budget that is not understood.
    """
    parsed = {text: parse_budget(text, AutoBudget()) for text in budgets}
    model = PocketModel(family)
    for seed in seeds:
        scenes = make_scenes(seed, num_questions)
        given = [
            each
            for scene in scenes
            for each in _answers(model, scene, parsed, PICTURE_PX.get(family, SCENE_PX), fingerprint(scenes))
        ]
        for budget in budgets:
            append_answers(answers, (each for each in given if each.budget == budget))


def _answers(
    model: PocketModel, asked: AskedScene, budgets: dict[str, Budget | AutoBudget], side_px: int, question_set: str
) -> Iterator[ScoredAnswer]:
    picture = picture_of(asked.scene, side_px)
    encoded = model.selector.encode(picture)
    for question, setting in zip(asked.questions, asked.settings, strict=True):
        for name, budget in budgets.items():
            chosen = budget.of(what_is_asked(question.text)) if isinstance(budget, AutoBudget) else budget
            num_kept = chosen.num_kept(len(encoded.vision))
            num_words = len(normalise(question.answer).split())
            said = model.answer(picture, encoded, question.text, num_kept, num_words)
            yield _scored(asked, question, setting, name, said, num_kept, question_set)


def _scored(
    asked: AskedScene, question: Question, setting: str, budget: str, said: str, num_kept: int, question_set: str
) -> ScoredAnswer:
    return ScoredAnswer(
        method="unpruned" if budget == "all" else "mmtok",
        budget=budget,
        seed=asked.seed,
        scene=asked.index,
        kind=question.kind,
        setting=setting,
        question=question.text,
        expected=question.answer,
        said=said,
        is_right=is_right(question, said),
        num_prompt_tokens=0,
        num_image_tokens=num_kept,
        latency_ms=0.0,
        cell_s=0.0,
        question_set=question_set,
    )
