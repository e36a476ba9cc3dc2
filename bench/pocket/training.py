"""Training the pocket model: first its eyes, then its answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from mmtok_deploy.bench.pocket.model import NUM_IMAGE_TOKENS, PATCH_PX, make_model, make_processor
from mmtok_deploy.bench.pocket.questions import Kind, Question, ask
from mmtok_deploy.bench.pocket.scenes import (
    CHARACTERS,
    COLOR_RGB,
    SCENE_PX,
    SHAPES,
    SIZE_PX,
    Scene,
    draw,
    draw_mask,
    make_scene,
)

__all__ = ["STAGES", "Stage", "Training"]

_GRID = SCENE_PX // PATCH_PX
_NOTHING = "nothing"
# A patch shows a thing where at least this many of its 64 pixels do.
_MIN_PIXELS = 7
# What each patch is asked for, each a choice between words: the tower learns them as directions of the language
# model's own word embeddings, as CLIP's image features come aligned with text.
_PATCH_CHOICES: tuple[tuple[str, ...], ...] = (
    (*COLOR_RGB, _NOTHING),
    (*SHAPES, *(character.lower() for character in CHARACTERS), _NOTHING),
    (*SIZE_PX, "digit", "letter", _NOTHING),
    ("top", "bottom"),
    ("left", "right"),
    ("middle", _NOTHING),
)
_LOGIT_SCALE = 4.0
# Most patches show nothing: they count for less.
_NOTHING_WEIGHT = 0.15

_KIND_WEIGHTS: dict[Kind, float] = {
    "existence": 0.34,
    "simple": 0.10,
    "count": 0.16,
    "position": 0.14,
    "reading": 0.14,
    "attribute": 0.12,
}
_NUM_QUESTIONS = 12
_PIXEL_MEAN, _PIXEL_STD = (
    torch.tensor(values)[:, None, None]
    for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the training: what is learned, for how many steps, from how many scenes a step."""

    name: str
    num_steps: int
    batch_size: int
    learning_rate: float


STAGES = (
    Stage("patches", 3000, 20, 1.2e-3),
    Stage("answers", 4000, 12, 1.2e-3),
)


class _Scenes(Dataset[dict[str, Tensor]]):
    """Scene number `index` of a stage, always the same for a seed."""

    def __init__(self, stage: Stage, seed: int, tokenizer: Any) -> None:
        self._stage = stage
        self._seed = seed
        self._words = tokenizer.get_vocab()
        self._tokenizer = tokenizer

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self._seed, 1 + STAGES.index(self._stage), index])
        scene = make_scene(rng)
        picture = draw(scene).resize((SCENE_PX, SCENE_PX), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self._stage.name == "patches":
            return {"pixels": pixels, "targets": _patch_targets(scene)}
        kinds = rng.choice(list(_KIND_WEIGHTS), _NUM_QUESTIONS, p=list(_KIND_WEIGHTS.values()))
        questions = [question for kind in kinds if (question := ask(rng, scene, kind))]
        return {"pixels": pixels, **self._packed(questions)}

    def _packed(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        segments: list[int] = []
        for number, question in enumerate(questions, start=1):
            asked = self._ids(f"{question.text} assistant :")
            answered = [*self._ids(question.answer), self._words["</s>"]]
            ids += asked + answered
            labels += [_IGNORED] * len(asked) + answered
            segments += [number] * (len(asked) + len(answered))
        return {"ids": torch.tensor(ids), "labels": torch.tensor(labels), "segments": torch.tensor(segments)}

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _patch_targets(scene: Scene) -> Tensor:
    """Returns [196, choices] int64: for each patch, the index of the right word of each of `_PATCH_CHOICES`."""
    patches = draw_mask(scene).reshape(_GRID, PATCH_PX, _GRID, PATCH_PX).swapaxes(1, 2).reshape(NUM_IMAGE_TOKENS, -1)
    counts = np.stack([(patches == item).sum(1) for item in range(1 + len(scene.things) + len(scene.glyphs))], axis=1)
    counts[:, 0] = _MIN_PIXELS - 1
    shown = counts.argmax(1)
    answers = [(_NOTHING, _NOTHING, _NOTHING, _NOTHING)]
    answers += [(thing.color, thing.shape, thing.size, "middle") for thing in scene.things]
    answers += [
        (_NOTHING, glyph.character.lower(), "digit" if glyph.character.isdigit() else "letter", "middle")
        for glyph in scene.glyphs
    ]
    middles = {
        int(item.y // PATCH_PX) * _GRID + int(item.x // PATCH_PX): number
        for number, item in enumerate((*scene.things, *scene.glyphs), start=1)
    }
    targets = []
    for patch, item in enumerate(shown):
        color, name, size, _ = answers[item]
        vertical = "top" if patch // _GRID < _GRID / 2 else "bottom"
        horizontal = "left" if patch % _GRID < _GRID / 2 else "right"
        middle = "middle" if patch in middles else _NOTHING
        words = (color, name, size, vertical, horizontal, middle)
        targets.append([choice.index(word) for choice, word in zip(_PATCH_CHOICES, words, strict=True)])
    return torch.tensor(targets)


def _collate(scenes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    padding = {"ids": 0, "labels": _IGNORED, "segments": -1}
    return {
        name: nn.utils.rnn.pad_sequence([scene[name] for scene in scenes], batch_first=True, padding_value=padding[name])
        if name in padding
        else torch.stack([scene[name] for scene in scenes])
        for name in scenes[0]
    }


class Training:
    """A training that can be left and taken up again at any step.

    Args:
        folder: Where the state is kept between runs.
        seed: Of the weights and of every scene.
        device: Where the model is trained.
    """

    def __init__(self, folder: Path, seed: int, device: torch.device, stages: Sequence[Stage] = STAGES) -> None:
        self.processor = make_processor()
        self.model = make_model(self.processor, seed).to(device)
        self.num_steps_done = 0
        self._folder = folder
        self._seed = seed
        self._device = device
        self._stages = stages
        self._words = self.processor.tokenizer.get_vocab()
        prefix = self.processor.tokenizer("user : <image>")["input_ids"]
        self._prefix = torch.tensor([*prefix[:-1]], device=device)

    @property
    def num_steps(self) -> int:
        return sum(stage.num_steps for stage in self._stages)

    def run(self, on_step: Callable[[int, Stage, dict[str, float]], None], save_every: int = 200) -> None:
        """Trains to the end, from where the state in the folder stands."""
        state = self._load()
        first = 0
        for stage in self._stages:
            begun = max(0, self.num_steps_done - first)
            if begun < stage.num_steps:
                optimizer = self._optimizer(stage)
                if begun and state is not None:
                    optimizer.load_state_dict(state["optimizer"])
                self._run_stage(stage, begun, optimizer, on_step, save_every)
            first += stage.num_steps

    def _run_stage(
        self,
        stage: Stage,
        begun: int,
        optimizer: torch.optim.Optimizer,
        on_step: Callable[[int, Stage, dict[str, float]], None],
        save_every: int,
    ) -> None:
        losses_of = self._patch_losses if stage.name == "patches" else self._answer_losses
        for step, batch in enumerate(self._batches(stage, begun), start=begun):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * _schedule(step / stage.num_steps)
            with torch.autocast(self._device.type, torch.bfloat16):
                loss, figures = losses_of({name: value.to(self._device) for name, value in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            self.num_steps_done += 1
            on_step(self.num_steps_done, stage, figures)
            if self.num_steps_done % save_every == 0 or step + 1 == stage.num_steps:
                self._save(optimizer)

    def _batches(self, stage: Stage, begun: int) -> Iterator[dict[str, Tensor]]:
        scenes = _Scenes(stage, self._seed, self.processor.tokenizer)
        order = range(begun * stage.batch_size, stage.num_steps * stage.batch_size)
        return iter(
            DataLoader(
                scenes, stage.batch_size, sampler=order, collate_fn=_collate, num_workers=1, prefetch_factor=4
            )
        )

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        tower = self.model.model.vision_tower
        learned = list(self.model.model.multi_modal_projector.parameters())
        if stage.name == "patches":
            learned += [*tower.parameters(), self.model.get_input_embeddings().weight]
        else:
            learned += list(self.model.model.language_model.parameters())
        for parameter in self.model.parameters():
            # No gradient of an earlier stage is left to count in the norm that is clipped.
            parameter.requires_grad_(False).grad = None
        for parameter in learned:
            parameter.requires_grad_(True)
        matrices = [parameter for parameter in learned if parameter.ndim > 1]
        vectors = [parameter for parameter in learned if parameter.ndim <= 1]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
        )

    def _patch_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        tokens = self.model.model.multi_modal_projector(self._tower_features(batch["pixels"]))
        words = self.model.get_input_embeddings().weight
        total = tokens.new_zeros((), dtype=torch.float32)
        figures = {}
        for number, choice in enumerate(_PATCH_CHOICES):
            directions = words[[self._words[word] for word in choice]]
            logits = (_LOGIT_SCALE * tokens @ directions.T).float().flatten(0, 1)
            target = batch["targets"][..., number].flatten()
            weight = torch.ones(len(choice), device=logits.device)
            if choice[-1] == _NOTHING:
                weight[-1] = _NOTHING_WEIGHT if number < 3 else 0.5
            total = total + functional.cross_entropy(logits, target, weight)
            shown = target != choice.index(_NOTHING) if _NOTHING in choice else target >= 0
            figures[choice[0]] = (logits.argmax(-1) == target)[shown].float().mean().item()
        return total, {"loss": total.item(), **figures}

    def _answer_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            features = self._tower_features(batch["pixels"])
        tokens = self.model.model.multi_modal_projector(features)
        embed = self.model.get_input_embeddings()
        ids, labels, segments = batch["ids"], batch["labels"], batch["segments"]
        prefix = embed(self._prefix).expand(len(ids), -1, -1)
        embeddings = torch.cat([prefix, tokens.to(prefix.dtype), embed(ids)], dim=1)
        num_before = prefix.shape[1] + tokens.shape[1]
        segments = functional.pad(segments, (num_before, 0))
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=_mask(segments),
            position_ids=_positions(segments),
            use_cache=False,
        ).last_hidden_state[:, num_before:]
        # Each answer's token is predicted by the one before it.
        at_answer = labels[:, 1:] != _IGNORED
        logits = self.model.lm_head(hidden[:, :-1][at_answer]).float()
        target = labels[:, 1:][at_answer]
        loss = functional.cross_entropy(logits, target)
        right = logits.argmax(-1) == target
        return loss, {"loss": loss.item(), **self._shares(right, target)}

    def _tower_features(self, pixels: Tensor) -> Tensor:
        """Returns [B, 196, 128], as LLaVA reads them: before the tower's last layer, which is not run."""
        tower = self.model.model.vision_tower
        hidden = tower.embeddings((pixels / 255 - _PIXEL_MEAN.to(pixels.device)) / _PIXEL_STD.to(pixels.device))
        hidden = tower.pre_layrnorm(hidden)
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]

    def _shares(self, right: Tensor, target: Tensor) -> dict[str, float]:
        groups = {"yes/no": ("yes", "no"), "digits": tuple("0123456789"), "letters": tuple("bcefhklptx")}
        groups |= {"where": ("top", "bottom", "left", "right"), "color": tuple(COLOR_RGB)}
        shares = {}
        for name, words in groups.items():
            chosen = torch.isin(target, torch.tensor([self._words[word] for word in words], device=target.device))
            if chosen.any():
                shares[name] = right[chosen].float().mean().item()
        return shares

    def save_checkpoint(self) -> Path:
        """Returns the folder of the checkpoint, in bfloat16, as Hugging Face and SGLang load it."""
        folder = self._folder / "checkpoint"
        model = copy.deepcopy(self.model).to("cpu", torch.bfloat16)
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "state.pt"
        torch.save(
            {"steps": self.num_steps_done, "seed": self._seed, "model": self.model.state_dict(),
             "optimizer": optimizer.state_dict()},
            path.with_suffix(".new"),
        )
        path.with_suffix(".new").replace(path)

    def _load(self) -> dict[str, Any] | None:
        path = self._folder / "state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location=self._device, weights_only=True)
        if state["seed"] != self._seed:
            raise ValueError(f"{path} is of a training with seed {state['seed']}, not {self._seed}: name another folder")
        self.model.load_state_dict(state["model"])
        self.num_steps_done = state["steps"]
        return state


def _schedule(share: float) -> float:
    """Returns the learning rate's factor after `share` of the steps: up over the first 4%, down by half a cosine."""
    return min(1.0, share / 0.04 + 0.01) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def _mask(segments: Tensor) -> Tensor:
    """Returns [B, 1, L, L] bool: a token reads the image before all questions (segment 0) and its own question."""
    row, column = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (((column == 0) | (row == column)) & causal)[:, None]


def _positions(segments: Tensor) -> Tensor:
    """Returns [B, L]: as if each question followed the image alone."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_first = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    num_before = (segments == 0).sum(1, keepdim=True)
    start = torch.where(is_first, index, 0).cummax(1).values
    return torch.where(segments == 0, index, index - start + num_before)
