"""Trains a pocket model: stages for the vision encoder, and stages for the answers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import rotate_half

from mmtok_bench.pocket.scenes import COLOR_RGB, DIGITS, LETTERS
from pocket_training import TrainedFamily
from pocket_training.model import NUM_IMAGE_TOKENS, make_pocket_model
from pocket_training.training_data import (
    IGNORED,
    NOTHING,
    PATCH_CHOICES,
    Task,
    TrainingPictures,
    TrainingScenes,
    collate,
)
from pocket_training.training_pages import PAGE_CHOICES, TrainingPages
from pocket_training.training_sizes import TrainingSizes
from pocket_training.training_tiles import TrainingTiles

__all__ = ["STAGES", "STAGES_ON_PAGES", "STAGES_ON_SIZES", "Stage", "Training", "where_heads_look"]

# Factor of the products of image tokens and word embeddings, so that they separate tokens of small norm.
_LOGIT_SCALE = 4.0
# Most patches show nothing, and most patches of a thing are not its middle: these have a smaller weight.
_NOTHING_WEIGHTS = (0.15, 0.15, 0.15, 1.0, 1.0, 0.5, 0.15)
# A token names the number of a character in its value by words whose embeddings are rolled by half of their width,
# since the words themselves name the digit that it shows.
_ROLLS = (0, 0, 0, 0, 0, 0, 1 / 2)
# The second layer: after the first, tokens of a thing have both its colour and its shape. The third for pages: in the
# first, tokens of a value look for its label.
_LOOKING_LAYER = 1
_LOOKING_LAYER_ON_PAGES = 2
_LOOKING_WEIGHT = 1.0
_NAMING_WEIGHT = 0.3
_SHOWN_WORDS = {
    "yes/no": ("yes", "no"),
    "digits": DIGITS,
    "letters": tuple(letter.lower() for letter in LETTERS),
    "where": ("top", "bottom", "left", "right"),
    "color": tuple(COLOR_RGB),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the training.

    Args:
        task: "patches": the tower and the projector learn to classify patches by the language model's word embeddings,
            which aligns features with text, as in CLIP. "answers": the projector and the language model learn to
            answer; the tower is frozen, as in LLaVA. "characters": as "patches", on scenes with more characters, and
            the word embeddings are frozen. "page patches": as "characters", on pages. "page answers": the whole model
            learns to answer questions about pages. "size patches" and "size answers": the same about scenes, each
            batch at one of three sizes. "tile patches" and "tile answers": the same about scenes in tiles.
        num_steps: Number of steps.
        batch_size: Scenes in a step.
        learning_rate: The highest learning rate of its schedule.
    """

    task: Task
    num_steps: int
    batch_size: int
    learning_rate: float


STAGES: dict[TrainedFamily, tuple[Stage, ...]] = {
    "llava-1.5": (
        Stage("patches", 2200, 20, 1.2e-3),
        Stage("answers", 2000, 10, 1.2e-3),
        Stage("characters", 1000, 20, 1.0e-3),
        Stage("answers", 500, 10, 6e-4),
    ),
    "qwen2.5-vl": (
        Stage("patches", 1800, 12, 1.2e-3),
        Stage("answers", 1600, 10, 1.2e-3),
        Stage("characters", 1000, 16, 1.0e-3),
        Stage("answers", 500, 10, 6e-4),
    ),
    "llava-next": (Stage("tile patches", 1500, 20, 1.2e-3), Stage("tile answers", 2000, 10, 1.0e-3)),
}
"""Family -> its stages. Those of LLaVA-NeXT follow the pocket LLaVA-1.5's."""


STAGES_ON_PAGES = (Stage("page patches", 450, 12, 1.2e-3), Stage("page answers", 900, 10, 1.0e-3))
"""The stages that follow the pocket Qwen2.5-VL's own, for a model that reads pages."""

STAGES_ON_SIZES = (Stage("size patches", 600, 12, 1.2e-3), Stage("size answers", 1000, 10, 1.0e-3))
"""The stages that follow the pocket Qwen2.5-VL's own, for a model that sees scenes at three sizes."""


class Training:
    """A training run that can be stopped, and continued from its last saved state.

    Args:
        folder: Folder of the saved state.
        family: Family of the model.
        seed: Seed of the weights and of all scenes.
        device: Device of the model.
        stages: The stages in order; None for those of the family.
        start: Checkpoint of a pocket model of the family whose weights the training starts from; None for random ones.
    """

    def __init__(
        self,
        folder: Path,
        family: TrainedFamily,
        seed: int,
        device: torch.device,
        stages: Sequence[Stage] | None = None,
        start: Path | None = None,
    ) -> None:
        self.pocket = make_pocket_model(family, seed)
        if start is not None:
            self.pocket.load(start)
        self.pocket.model.to(device)
        self.num_steps_done = 0
        self._folder = folder
        self._family = family
        self._seed = seed
        self._device = device
        self._stages = STAGES[family] if stages is None else stages
        self._is_of_pages = self._stages[0].task.startswith("page")
        tokenizer = self.pocket.processor.tokenizer
        self._words = tokenizer.get_vocab()
        self._before, self._after = (
            torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64, device=device)
            for text in (self.pocket.before, self.pocket.after)
        )

    @property
    def num_steps(self) -> int:
        """Number of steps of all stages."""
        return sum(stage.num_steps for stage in self._stages)

    def run(self, on_step: Callable[[int, Stage, dict[str, float]], None], save_every: int = 200) -> None:
        """Trains to the end, from the saved state in the folder if there is one."""
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
        losses_of = self._answer_losses if stage.task.endswith("answers") else self._patch_losses
        for step, batch in enumerate(self._batches(stage, begun), start=begun):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * _schedule(step / stage.num_steps)
            # On a CPU without bfloat16 instructions, bfloat16 products take about forty times as long as float32 ones.
            with torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda"):
                loss, figures = losses_of({name: value.to(self._device) for name, value in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.pocket.model.parameters(), 1.0)
            optimizer.step()
            self.num_steps_done += 1
            on_step(self.num_steps_done, stage, figures)
            if self.num_steps_done % save_every == 0 or step + 1 == stage.num_steps:
                self._save(optimizer)

    def _batches(self, stage: Stage, begun: int) -> Iterator[dict[str, Tensor]]:
        from_model = (stage.task, self._seed, self.pocket.processor.tokenizer, self.pocket.asked)
        if stage.task.startswith("size"):
            scenes: TrainingPictures = TrainingSizes(*from_model, stage.batch_size)
        elif stage.task.startswith("tile"):
            scenes = TrainingTiles(*from_model)
        else:
            scenes = (TrainingPages if self._is_of_pages else TrainingScenes)(*from_model)
        order = range(begun * stage.batch_size, stage.num_steps * stage.batch_size)
        return iter(
            DataLoader(scenes, stage.batch_size, sampler=order, collate_fn=collate, num_workers=1, prefetch_factor=4)
        )

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        learned: list[Tensor] = list(self.pocket.projector.parameters())
        if stage.task.endswith("answers"):
            learned += self.pocket.language_model.parameters()
        if stage.task != "answers":
            learned += self.pocket.tower
        if stage.task == "patches":
            learned.append(self.pocket.embedding.weight)
        for parameter in self.pocket.model.parameters():
            # A gradient of an earlier stage would count in the norm that is clipped.
            parameter.requires_grad_(False).grad = None
        for parameter in learned:
            parameter.requires_grad_(True)
        matrices = [parameter for parameter in learned if parameter.ndim > 1]
        vectors = [parameter for parameter in learned if parameter.ndim <= 1]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
        )

    def _patch_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        tokens = self.pocket.image_tokens(self.pocket.features(batch["pixels"]))
        return self._naming_loss(tokens, batch["targets"])

    def _naming_loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Returns the cross-entropy of image tokens [B, N, 192] against their patches' words, and the accuracies."""
        words = self.pocket.embedding.weight
        total = tokens.new_zeros((), dtype=torch.float32)
        figures = {}
        choices = PAGE_CHOICES if self._is_of_pages else PATCH_CHOICES
        for number, (choice, nothing_weight, roll) in enumerate(zip(choices, _NOTHING_WEIGHTS, _ROLLS, strict=False)):
            directions = words[[self._words[word] for word in choice]].roll(round(roll * words.shape[1]), dims=1)
            logits = (_LOGIT_SCALE * tokens @ directions.T).float().flatten(0, 1)
            target = targets[..., number].flatten()
            logits, target = logits[target != IGNORED], target[target != IGNORED]
            weight = torch.tensor([nothing_weight if word == NOTHING else 1.0 for word in choice], device=logits.device)
            total = total + functional.cross_entropy(logits, target, weight)
            right = (logits.argmax(-1) == target)[weight[target] == 1]
            figures[choice[0] + "'" * round(2 * roll)] = right.float().mean().item()
        return total, {"loss": total.item(), **figures}

    def _answer_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        layer = _LOOKING_LAYER_ON_PAGES if self._is_of_pages else _LOOKING_LAYER
        attention = self.pocket.language_model.layers[layer].self_attn
        labels = batch["labels"]
        first = self.pocket.language_model.layers[0].self_attn
        with _inputs_of(attention) as attended, _inputs_of(first) as attended_first:
            tokens, hidden = self.read(batch["pixels"], batch["ids"], batch["segments"])
        # Each token of an answer is predicted from the one before it.
        at_answer = labels[:, 1:] != IGNORED
        logits = self.pocket.model.lm_head(hidden[:, :-1][at_answer]).float()
        target = labels[:, 1:][at_answer]
        loss = functional.cross_entropy(logits, target)
        right = logits.argmax(-1) == target
        looks = functional.pad(_looks_of_tokens(batch), (len(self._before), len(self._after)))
        looking = _looking_loss(
            where_heads_look(attention, **attended, num_heads=looks.shape[1], num_before=looks.shape[-1]),
            looks=looks,
            has_named=batch["has_named"],
        )
        naming, _ = self._naming_loss(tokens, batch["targets"])
        figures = {"loss": loss.item(), "looking": looking.item(), "naming": naming.item()}
        total = loss + _LOOKING_WEIGHT * looking + _NAMING_WEIGHT * naming
        if self._is_of_pages:
            labelling = self._label_loss(first, attended_first, batch["label_patches"])
            figures["labelling"] = labelling.item()
            total = total + _LOOKING_WEIGHT * labelling
        return total, {**figures, **self._shares(right, target)}

    def _label_loss(self, attention: Any, attended: dict[str, Any], wanted: Tensor) -> Tensor:
        """Returns the cross-entropy of the first head's attention from values, with all of it on their labels."""
        num_before = len(self._before)
        seen = slice(num_before + NUM_IMAGE_TOKENS)
        rotations = tuple(rotation[:, seen] for rotation in attended["rotations"])
        logits = where_heads_look(attention, attended["hidden"][:, seen], rotations, num_heads=1, num_before=0)
        is_later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        found = logits[:, 0].masked_fill(is_later, -torch.inf).log_softmax(-1)[:, num_before:]
        has_label = wanted.any(-1)
        is_label = functional.pad(wanted, (num_before, 0))[has_label]
        return -found[has_label].masked_fill(~is_label, -torch.inf).logsumexp(-1).mean()

    def read(self, pixels: Tensor, ids: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image tokens [B, N, width] and the language model's output [B, L, width] at the texts.

        Args:
            pixels: [B, 3, side, side], 0 to 255.
            ids: [B, L], the tokens after the image.
            segments: [B, L], the number of each token's question, from 1; questions do not attend to each other.
        """
        features = self.pocket.features(pixels)
        tokens, embed = self.pocket.image_tokens(features), self.pocket.embedding
        before, after = (embed(part).expand(len(ids), -1, -1) for part in (self._before, self._after))
        embeddings = torch.cat([before, tokens.to(before.dtype), after, embed(ids)], dim=1)
        num_before = embeddings.shape[1] - ids.shape[1]
        segments = functional.pad(segments, (num_before, 0))
        output = self.pocket.language_model(
            inputs_embeds=embeddings,
            attention_mask=_mask(segments),
            position_ids=self.pocket.positions(_numbers(segments), len(self._before), math.isqrt(tokens.shape[1])),
            use_cache=False,
        )
        return tokens, output.last_hidden_state[:, num_before:]

    def _shares(self, right: Tensor, target: Tensor) -> dict[str, float]:
        shares = {}
        for name, words in _SHOWN_WORDS.items():
            chosen = torch.isin(target, torch.tensor([self._words[word] for word in words], device=target.device))
            if chosen.any():
                shares[name] = right[chosen].float().mean().item()
        return shares

    def save_checkpoint(self) -> Path:
        """Writes the checkpoint in bfloat16, as Hugging Face and SGLang load it; returns its folder."""
        folder = self._folder / "checkpoint"
        model = self.pocket.served().to("cpu", torch.bfloat16)
        model.save_pretrained(folder)
        self.pocket.processor.save_pretrained(folder)
        return folder

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "state.pt"
        torch.save(
            {
                "steps": self.num_steps_done,
                "family": self._family,
                "seed": self._seed,
                "model": self.pocket.model.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
            path.with_suffix(".new"),
        )
        path.with_suffix(".new").replace(path)

    def _load(self) -> dict[str, Any] | None:
        path = self._folder / "state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location=self._device, weights_only=True)
        if (state["family"], state["seed"]) != (self._family, self._seed):
            raise ValueError(
                f"{path} is of a training of {state['family']} with seed {state['seed']}, not of {self._family} with "
                f"{self._seed}: name another folder"
            )
        self.pocket.model.load_state_dict(state["model"])
        self.num_steps_done = state["steps"]
        return state


def _schedule(share: float) -> float:
    """Returns the learning rate's factor after `share` of the steps: warm-up over the first 4%, times half a cosine."""
    return min(1.0, share / 0.04 + 0.01) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def where_heads_look(
    attention: Any, hidden: Tensor, rotations: tuple[Tensor, Tensor], num_heads: int, num_before: int
) -> Tensor:
    """Returns [B, num_heads, L, num_before]: logits of an attention's first heads over the first tokens.

    If `num_before` is 0, they are [B, num_heads, L, L], over all tokens.

    Args:
        attention: The attention of a layer of Llama or Qwen2.5-VL.
        hidden: [B, num_before + L, width], its input.
        rotations: cos and sin, [B, num_before + L, head_dim] each.
        num_heads: Number of heads.
        num_before: Number of tokens before the queries.
    """

    def heads(layer: nn.Linear, part: slice) -> Tensor:
        rows = num_heads * attention.head_dim
        bias = None if layer.bias is None else layer.bias[:rows]
        states = functional.linear(hidden[:, part], layer.weight[:rows], bias)
        states = states.unflatten(-1, (num_heads, attention.head_dim)).transpose(1, 2)
        cos, sin = (rotation[:, None, part] for rotation in rotations)
        rotated: Tensor = states * cos + rotate_half(states) * sin
        return rotated

    queries = heads(attention.q_proj, slice(num_before, None))
    keys = heads(attention.k_proj, slice(num_before or None))
    return (queries @ keys.mT).float() * float(attention.scaling)


def _looking_loss(logits: Tensor, *, looks: Tensor, has_named: Tensor) -> Tensor:
    """Returns the KL divergence of attention from the patches that show the things named in a question.

    The first token is always a target: if nothing is there, all attention goes to it, so that its share tells the
    number of things.

    Args:
        logits: [B, heads, L, num_before].
        looks: [B, heads, L, num_before], 1 at the target patches.
        has_named: [B, L], whether the question has named something by this token.
    """
    wanted = looks.clone()
    wanted[..., 0] = 1.0
    wanted = wanted / wanted.sum(-1, keepdim=True)
    apart = (torch.xlogy(wanted, wanted) - wanted * logits.log_softmax(-1)).sum(-1)
    return apart.transpose(1, 2)[has_named].mean()


def _looks_of_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Returns [B, heads, L, N]: for each token, its target patches."""
    looks = batch["looks"].transpose(1, 2)
    numbers = torch.arange(len(looks), device=looks.device)[:, None]
    return looks[numbers, batch["look_rows"]].transpose(1, 2)


@contextlib.contextmanager
def _inputs_of(attention: nn.Module) -> Iterator[dict[str, Any]]:
    """Yields a dictionary that has an attention's inputs `hidden` and `rotations` after it has run."""
    seen: dict[str, Any] = {}

    def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.update(hidden=keywords["hidden_states"], rotations=keywords["position_embeddings"])

    handle = attention.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _mask(segments: Tensor) -> Tensor:
    """Returns [B, 1, L, L] bool: a token attends to the image (segment 0) and to its own question."""
    row, column = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (((column == 0) | (row == column)) & causal)[:, None]


def _numbers(segments: Tensor) -> Tensor:
    """Returns [B, L], the places of tokens in a prompt that has only their own question."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_first = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    num_before = (segments == 0).sum(1, keepdim=True)
    start = torch.where(is_first, index, 0).cummax(1).values
    return torch.where(segments == 0, index, index - start + num_before)
