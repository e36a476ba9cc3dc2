"""The judge of every server: a Hugging Face model whose images are pruned by hand, teacher-forced.

Nothing of the plugin is used here. Features, placeholders and positions are Hugging Face's own; the selection is the
reference that the golden answers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sglang.srt.multimodal.processors.internvl import InternVLProcessor as Tiles
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from mmtok_bench.internvl_parts import InternVLProcessor
from mmtok_deploy import select_tokens
from mmtok_deploy.config import Coverage, KeySource
from mmtok_deploy.guidance import guidance_words
from mmtok_deploy.presets import PRESETS
from tests.runtime.films import Film

__all__ = ["HandPruned", "Pruned"]


@dataclass(frozen=True)
class Pruned:
    """A prompt as the language model reads it: embeddings, [3 or 1, L] positions, the next token's position.

    Embeddings are [L, D]; of Qwen3-VL [L, D * (1 + levels)], behind each token what DeepStack adds to the first layers.
    """

    embeddings: Tensor
    positions: Tensor
    next_position: int
    num_image_tokens: int
    token_ids: Tensor
    """[L]; a placeholder's where an image or film is."""


class HandPruned:
    def __init__(
        self, family: str, path: Path, device: torch.device = torch.device("cpu"), *, share_tiles: bool = False
    ) -> None:
        self.family = family
        self.device = device
        self.share_tiles = share_tiles
        is_internvl = family == "internvl3"
        weights = path / "transformers" if is_internvl else path
        self.model = AutoModelForImageTextToText.from_pretrained(weights, dtype=torch.float32).eval().to(device)
        if is_internvl:
            self.processor: Any = _TileProcessor(AutoTokenizer.from_pretrained(path), tile_tokens=64)
        else:
            self.processor = AutoProcessor.from_pretrained(path)
        self.preset = PRESETS[family]
        self._config = self.preset.config
        self._by_frame = False
        self._keys: KeySource = "input"
        self._skipped: Sequence[Tensor] = ()

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    @torch.no_grad()
    def prune(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        guidance: Sequence[str],
        budget: float | int | Sequence[float | int] | None,
        *,
        kept: list[Tensor] | None = None,
        coverage: Coverage = "multimodal",
        original_positions: bool = True,
        own_levels: bool = True,
        raster_order: bool = True,
        films: Sequence[Film] = (),
        by_frame: bool = False,
        keys: KeySource = "input",
        skipped: Sequence[Tensor] = (),
    ) -> Pruned:
        """Prunes each image and film to `budget` (tokens, or a ratio; None for all), guided by its text.

        Args:
            prompt: With one placeholder an image.
            images: In the order of the prompt.
            guidance: One text an image or film, in the order of the prompt.
            budget: int for tokens (of each tile, for tiles), float for a ratio, None for the unpruned prompt; or a list
                of one an image.
            kept: Indices to keep of each image, or tokens to read, in place of a selection.
            coverage: What the selection covers.
            original_positions: False gives kept tokens the first K positions of their image: the mistake to catch.
            own_levels: False gives kept tokens what DeepStack has of the image's first K tokens: another one.
            raster_order: False has kept tokens, with their own positions, read from the last to the first: another one.
            films: In the order of the prompt.
            by_frame: Whether each pair of frames of a film keeps as many, selected by itself.
            keys: The side of the projector by whose features tokens are compared.
            skipped: The [N] bool tokens of each image whose patches no other one of it attends to, and that are not
                selected from; all others attend to each other as without `skipped`. For a Qwen, without films.
        """
        self._by_frame, self._keys, self._skipped = by_frame, keys, skipped
        inputs = self._inputs(prompt, images, films)
        with self.device, self._without_patches(inputs, skipped):
            return self._pruned(
                *(inputs, images, guidance, budget, kept, coverage), original_positions, own_levels, raster_order
            )

    def _pruned(
        self,
        inputs: Any,
        images: Sequence[Image.Image],
        guidance: Sequence[str],
        budget: float | int | Sequence[float | int] | None,
        kept: list[Tensor] | None,
        coverage: Coverage,
        original_positions: bool,
        own_levels: bool,
        raster_order: bool,
    ) -> Pruned:
        ids = inputs["input_ids"][0]
        embed = self.model.get_input_embeddings()
        embeddings = embed(ids).clone()
        is_image = self._is_image(ids)
        positions, next_position = self._positions(inputs)
        if is_image.any():
            features, take = self._features(inputs, images)
            rows = torch.cat([vision for vision, _ in features])
            embeddings = torch.nn.functional.pad(embeddings, (0, rows.shape[1] - embeddings.shape[1]))
            embeddings[is_image] = rows
            if budget is not None:
                budgets = [budget] * len(features) if isinstance(budget, float | int) else budget
                self._config = replace(self.preset.config, coverage=coverage)
                taken = take(guidance, budgets) if kept is None else kept
                taken = taken if raster_order else [each.flip(0) for each in taken]
                sizes = [len(vision) for vision, _ in features]
                of_runs = self._by_run(inputs, taken, sizes)
                pruned = self._cut(ids, embeddings, positions, next_position, of_runs, original_positions)
                if own_levels:
                    return pruned
                firsts = self._by_run(inputs, [torch.arange(len(each)) for each in taken], sizes)
                others = self._cut(ids, embeddings, positions, next_position, firsts, original_positions)
                width = embed.embedding_dim
                rows = torch.cat([pruned.embeddings[:, :width], others.embeddings[:, width:]], dim=1)
                return replace(pruned, embeddings=rows)
        return Pruned(embeddings, positions, next_position, int(is_image.sum()), ids)

    @torch.no_grad()
    def vision_tokens(self, prompt: str, images: Sequence[Image.Image]) -> list[Tensor]:
        """Returns the [N, D] tokens of each image, unpruned."""
        inputs = self.processor(text=[prompt], images=list(images), return_tensors="pt").to(self.device)
        with self.device:
            features, _ = self._features(inputs, images)
        return [vision[:, : self.model.get_input_embeddings().embedding_dim] for vision, _ in features]

    @torch.no_grad()
    def film_tokens(self, prompt: str, films: Sequence[Film]) -> list[Tensor]:
        """Returns the [N, D] tokens of each film, unpruned, as the language model reads them."""
        inputs = self._inputs(prompt, (), films)
        with self.device:
            features, _ = self._features(inputs, [])
        return [vision[:, : self.model.get_input_embeddings().embedding_dim] for vision, _ in features]

    def _inputs(self, prompt: str, images: Sequence[Image.Image], films: Sequence[Film]) -> Any:
        """Returns the processor's inputs, on the model's device."""
        videos: dict[str, Any] = {}
        if films:
            of_glm = self.processor.video_processor if self.family.startswith("glm") else None
            frames, metadata = zip(*(film.frames(self.device.type, of_glm) for film in films), strict=True)
            videos = {"videos": list(frames), "video_metadata": list(metadata), "do_sample_frames": False}
        inputs = self.processor(text=[prompt], images=list(images) or None, return_tensors="pt", **videos)
        return inputs.to(self.device)

    @torch.no_grad()
    def logprobs(self, pruned: Pruned, output_ids: Sequence[int]) -> Tensor:
        """Returns [steps, vocabulary] logprobs of each step, the earlier outputs given."""
        with self.device:
            return self._logprobs(pruned, output_ids)

    def _logprobs(self, pruned: Pruned, output_ids: Sequence[int]) -> Tensor:
        num_steps = len(output_ids)
        given = self.model.get_input_embeddings()(torch.tensor(list(output_ids[:-1]), dtype=torch.long))
        later = torch.arange(num_steps - 1) + pruned.next_position
        positions = torch.cat([pruned.positions, later.expand(len(pruned.positions), -1)], dim=1)
        width = given.shape[1]
        given = torch.nn.functional.pad(given, (0, pruned.embeddings.shape[1] - width))
        tokens, *levels = torch.cat([pruned.embeddings, given]).split(width, dim=1)
        # Zeros are added at the places of text.
        deepstack = {
            "visual_pos_masks": torch.ones(1, len(tokens), dtype=torch.bool),
            "deepstack_visual_embeds": levels,
        }
        hidden = self.model.model.language_model(
            inputs_embeds=tokens[None],
            position_ids=positions[:, None] if len(positions) == 3 else positions,
            **(deepstack if levels else {}),
        ).last_hidden_state[0, -num_steps:]
        return torch.log_softmax(self.model.lm_head(hidden).float(), dim=-1)

    def max_error(self, pruned: Pruned, meta_info: dict[str, Any]) -> float:
        """Returns the largest difference of the top logprobs that a server reported, over all steps."""
        output_ids = [token for _, token, _ in meta_info["output_token_logprobs"]]
        expected = self.logprobs(pruned, output_ids)
        return max(
            abs(expected[step, token].item() - float(logprob))
            for step, top in enumerate(meta_info["output_top_logprobs"])
            for logprob, token, _ in top
        )

    def _embed_guidance(self, text: str) -> Tensor:
        words = guidance_words(text, self.preset.guidance)
        ids = self.processor.tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
        rows: Tensor = self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
        return rows

    def _select(self, vision: Tensor, keys: Tensor, text: str, budget: float | int, excluded: Tensor | None) -> Tensor:
        kept = self._count(budget, vision)
        guidance = self._embed_guidance(text)
        keys = vision if self._keys == "output" else keys
        # The judge's selection is that of the host, whatever the device.
        with torch.device("cpu"):
            masked = None if excluded is None else excluded.cpu()
            chosen = select_tokens(
                vision.cpu(), keys.cpu(), guidance.cpu(), kept, config=self._config, excluded=masked
            ).kept
        return chosen.to(self.device)

    @contextmanager
    def _without_patches(self, inputs: Any, skipped: Sequence[Tensor]) -> Iterator[None]:
        """Has the vision encoder attend to the patches of other tokens alone."""
        if not skipped:
            yield
            return
        visual = self.model.model.visual
        tokens = torch.cat(list(skipped))
        if hasattr(visual, "window_size"):
            order, _ = get_vision_window_index(
                inputs["image_grid_thw"], visual.spatial_merge_size, visual.window_size, visual.patch_size
            )
            tokens = tokens[order]
        is_skipped = tokens.repeat_interleave(visual.spatial_merge_size**2)
        start = 0

        def attend(_: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, scaling: float, **kwargs: Any) -> Any:
            # A layer attends within one part of the patches after the other.
            nonlocal start
            part = is_skipped[start : start + k.shape[2]]
            start = (start + k.shape[2]) % len(is_skipped)
            scores = (q @ k.transpose(2, 3) * scaling).masked_fill(part, -torch.inf)
            return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2), None

        ALL_ATTENTION_FUNCTIONS.register("without_patches", attend)
        attention, visual.config._attn_implementation = visual.config._attn_implementation, "without_patches"
        try:
            yield
        finally:
            visual.config._attn_implementation = attention
        assert start == 0

    @staticmethod
    def _count(budget: float | int, vision: Tensor) -> int:
        return budget if isinstance(budget, int) else max(1, int(budget * len(vision)))

    def _positions(self, inputs: Any) -> tuple[Tensor, int]:
        if not self.family.startswith(("qwen", "glm")):
            length = inputs["input_ids"].shape[1]
            return torch.arange(length)[None], length
        names = ("image_grid_thw", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
        arguments = {name: inputs[name] for name in names if name in inputs}
        positions, _ = self.model.model.get_rope_index(inputs["input_ids"], **arguments)
        return positions[:, 0], int(positions.max()) + 1

    def _features(
        self, inputs: Any, images: Sequence[Image.Image]
    ) -> tuple[list[tuple[Tensor, Tensor]], Callable[[Sequence[str], Sequence[float | int]], list[Tensor]]]:
        """Returns each image's (unpruned tokens, _) and a function that picks from them.

        The function returns, for each image, either kept indices into its tokens (int64) or new tokens (float).
        """
        own: dict[str, Callable[..., Any]] = {
            "qwen2.5-vl": self._features_qwen2_5_vl,
            "llava-1.5": self._features_llava_1_5,
            "llava-next": self._features_llava_next,
            "internvl3": self._features_internvl3,
        }
        features: Callable[..., Any] = own.get(self.family, self._features_by_grid)
        found: tuple[list[tuple[Tensor, Tensor]], Callable[..., list[Tensor]]] = features(inputs, images)
        return found

    def _is_image(self, ids: Tensor) -> Tensor:
        config = self.model.config
        kinds = [
            token for token in (config.image_token_id, getattr(config, "video_token_id", None)) if token is not None
        ]
        return torch.isin(ids, torch.tensor(kinds, device=ids.device))

    def _features_qwen2_5_vl(self, inputs: Any, _images: Any) -> Any:
        visual, model = self.model.model.visual, self.model.model
        of_kind: dict[str, Any] = {}
        for kind, pixels, get_features in (
            ("image", "pixel_values", model.get_image_features),
            ("video", "pixel_values_videos", model.get_video_features),
        ):
            grids = inputs.get(f"{kind}_grid_thw")
            if grids is None:
                continue
            outputs, before = self._encode(
                visual.merger, get_features, **{pixels: inputs[pixels], f"{kind}_grid_thw": grids}
            )
            order, _ = get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)
            groups = before[0].reshape(-1, visual.spatial_merge_size**2, before[0].shape[-1]).mean(1)
            keys = torch.empty_like(groups)
            keys[order] = groups
            sizes = (grids.prod(-1) // visual.spatial_merge_size**2).tolist()
            of_kind[kind] = iter(zip(outputs, keys.split(sizes), strict=True))
        features = [next(of_kind[kind]) for kind, _ in self._items(inputs)]
        return features, lambda texts, budgets: self._select_items(inputs, features, texts, budgets)

    def _items(self, inputs: Any) -> list[tuple[str, int]]:
        """Returns each image and film in the order of the prompt: which of the two, and its steps in time."""
        ids, types = inputs["input_ids"][0], inputs["mm_token_type_ids"][0]
        is_image = self._is_image(ids)
        runs = types[is_image & ~is_image.roll(1)].tolist()
        nums_steps = iter(inputs["video_grid_thw"][:, 0].tolist() if "video_grid_thw" in inputs else ())
        items: list[tuple[str, int]] = []
        while runs:
            kind = "video" if runs.pop(0) == 2 else "image"
            num_steps = next(nums_steps) if kind == "video" else 1
            if self._has_timestamps:
                # A run for each step.
                del runs[: num_steps - 1]
            items.append((kind, num_steps))
        return items

    def _by_run(self, inputs: Any, taken: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Returns what is taken of each run of placeholders: a film has one for each step, others have one."""
        if not self._has_timestamps or "video_grid_thw" not in inputs:
            return list(taken)
        runs: list[Tensor] = []
        for chosen, size, (_, num_steps) in zip(taken, sizes, self._items(inputs), strict=True):
            step = size // num_steps
            runs += [chosen[chosen // step == place] - place * step for place in range(num_steps)]
        return runs

    @property
    def _has_timestamps(self) -> bool:
        return self.family.startswith(("qwen3", "glm"))

    def _select_items(
        self, inputs: Any, features: Any, texts: Sequence[str], budgets: Sequence[float | int]
    ) -> list[Tensor]:
        nums_parts = [num_steps if self._by_frame else 1 for _, num_steps in self._items(inputs)]
        if self._skipped:
            read = [(~mask).nonzero().flatten() for mask in self._skipped]
            return [
                places[self._select(vision[places], key[places], text, self._count(budget, vision), None)]
                for (vision, key), text, budget, places in zip(features, texts, budgets, read, strict=True)
            ]
        return [
            self._select_parts(vision, key, text, budget, num)
            for (vision, key), text, budget, num in zip(features, texts, budgets, nums_parts, strict=True)
        ]

    def _select_parts(self, vision: Tensor, keys: Tensor, text: str, budget: float | int, num_parts: int) -> Tensor:
        size = len(vision) // num_parts
        each = budget // num_parts if isinstance(budget, int) else budget
        kept = [
            self._select(rows, key, text, each, None)
            for rows, key in zip(vision.split(size), keys.split(size), strict=True)
        ]
        return torch.cat([chosen + part * size for part, chosen in enumerate(kept)])

    def _features_by_grid(self, inputs: Any, _images: Any) -> Any:
        model = self.model.model
        of_kind: dict[str, Any] = {}
        num_levels = 0
        for kind, pixels, get_features in (
            ("image", "pixel_values", model.get_image_features),
            ("video", "pixel_values_videos", model.get_video_features),
        ):
            if f"{kind}_grid_thw" in inputs:
                found, num_levels = self._encode_levels(get_features, inputs[pixels], inputs[f"{kind}_grid_thw"])
                of_kind[kind] = iter(found)
        features = [next(of_kind[kind]) for kind, _ in self._items(inputs)]
        tokens = [(rows[:, : rows.shape[1] // (1 + num_levels)], key) for rows, key in features]
        return features, lambda texts, budgets: self._select_items(inputs, tokens, texts, budgets)

    def _encode_levels(self, get_features: Any, pixels: Tensor, grids: Tensor) -> tuple[list[Any], int]:
        """Returns each image's (rows, levels of DeepStack behind each token; keys), and the number of levels."""
        visual = self.model.model.visual
        is_glm = self.family.startswith("glm")
        projector = visual.downsample if is_glm else visual.merger
        before: list[Tensor] = []
        hook = projector.register_forward_hook(lambda _, arguments, __: before.append(arguments[0]))
        try:
            output = get_features(pixels, grids)
        finally:
            hook.remove()
        of_layers = getattr(output, "deepstack_features", ())  # Qwen2-VL and Qwen3.5 have none
        # One tensor an image; before Transformers 5.19, one of all images for each level.
        levels = [
            level if isinstance(level, Tensor) else torch.cat(tuple(level))
            for level in (output.pooler_output, *of_layers)
        ]
        rows = torch.cat(levels, dim=1).split([len(each) for each in output.pooler_output])
        if is_glm:
            keys = before[0].mean((2, 3))  # [N, d, 2, 2]
        else:
            keys = before[0].reshape(-1, visual.spatial_merge_size**2, before[0].shape[-1]).mean(1)
        return list(zip(rows, keys.split([len(each) for each in rows]), strict=True)), len(of_layers)

    def _features_llava_1_5(self, inputs: Any, images: Sequence[Image.Image]) -> Any:
        projector = self.model.model.multi_modal_projector
        outputs, (keys, *_) = self._encode(projector, pixel_values=inputs["pixel_values"])
        features = list(zip([out.reshape(-1, out.shape[-1]) for out in outputs], keys, strict=True))
        pads = self.processor.image_processor.do_pad
        masks = [_outside(image.width, image.height) if pads else None for image in images]
        return features, lambda texts, budgets: [
            self._select(vision, key, text, budget, mask)
            for (vision, key), text, budget, mask in zip(features, texts, budgets, masks, strict=True)
        ]

    def _features_llava_next(self, inputs: Any, _images: Any) -> Any:
        projector = self.model.model.multi_modal_projector
        outputs, (before, after) = self._encode(
            projector, pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
        )
        grids = [_grid(size.tolist()) for size in inputs["image_sizes"]]
        counts = [1 + rows * columns for rows, columns in grids]

        def take(texts: Sequence[str], budgets: Sequence[float | int]) -> list[Tensor]:
            tiles = zip(after.split(counts), before.split(counts), texts, budgets, grids, strict=True)
            return [self._join_tiles(*image) for image in tiles]

        return [(tokens, tokens) for tokens in outputs], take

    def _features_internvl3(self, inputs: Any, _images: Any) -> Any:
        projector = self.model.model.multi_modal_projector
        _, (keys, vision) = self._encode(projector, pixel_values=inputs["pixel_values"])
        counts = [num * keys.shape[1] for num in inputs["num_tiles"]]
        features = list(zip(vision.flatten(0, 1).split(counts), keys.flatten(0, 1).split(counts), strict=True))
        return features, lambda texts, budgets: [
            self._select(tokens, key, text, budget, None)
            for (tokens, key), text, budget in zip(features, texts, budgets, strict=True)
        ]

    def _join_tiles(
        self, vision: Tensor, keys: Tensor, text: str, budget: float | int, grid: tuple[int, int]
    ) -> Tensor:
        if self.share_tiles:
            chosen = self._select(vision.flatten(0, 1), keys.flatten(0, 1), text, budget, None)
            places = [chosen - tile * vision.shape[1] for tile in range(len(vision))]
            kept = [each[(each >= 0) & (each < vision.shape[1])] for each in places]
        else:
            kept = [self._select(v, k, text, budget, None) for v, k in zip(vision, keys, strict=True)]
        rows, columns = grid
        side = round(vision.shape[1] ** 0.5)
        joined = torch.zeros(rows * side, columns * side, vision.shape[2])
        mask = torch.zeros(rows * side, columns * side, dtype=torch.bool)
        for crop in range(rows * columns):
            row, column = divmod(crop, columns)
            there = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            joined[there] = vision[crop + 1].reshape(side, side, -1)
            mask[there] = torch.isin(torch.arange(side * side), kept[crop + 1]).reshape(side, side)
        return torch.cat([vision[0][kept[0]], joined[mask]])

    def _encode(self, module: Any, get_features: Any = None, **pixels: Any) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        seen: list[Tensor] = []
        hook = module.register_forward_hook(lambda _, arguments, output: seen.extend((arguments[0], output)))
        try:
            output = (get_features or self.model.model.get_image_features)(**pixels)
        finally:
            hook.remove()
        tokens = output.pooler_output if hasattr(output, "pooler_output") else output
        return list(tokens), tuple(seen)

    def _cut(
        self,
        ids: Tensor,
        embeddings: Tensor,
        positions: Tensor,
        next_position: int,
        taken: Sequence[Tensor],
        original_positions: bool,
    ) -> Pruned:
        is_image = self._is_image(ids).tolist()
        starts = [i for i, image in enumerate(is_image) if image and (i == 0 or not is_image[i - 1])]
        pieces, places, kept_ids, end = [], [], [], 0
        for start, chosen in zip(starts, taken, strict=True):
            stop = start
            while stop < len(is_image) and is_image[stop]:
                stop += 1
            tokens = embeddings[start:stop][chosen] if chosen.ndim == 1 else chosen
            where = start + (chosen if chosen.ndim == 1 and original_positions else torch.arange(len(tokens)))
            pieces += [embeddings[end:start], tokens]
            places += [torch.arange(end, start), where]
            kept_ids += [ids[end:start], ids[start].expand(len(tokens))]
            end = stop
        pieces.append(embeddings[end:])
        places.append(torch.arange(end, len(ids)))
        kept, token_ids = torch.cat(pieces), torch.cat([*kept_ids, ids[end:]])
        num_image_tokens = sum(map(len, pieces[1::2]))
        if len(positions) == 1:
            return Pruned(kept, torch.arange(len(kept))[None], len(kept), num_image_tokens, token_ids)
        return Pruned(kept, positions[:, torch.cat(places)], next_position, num_image_tokens, token_ids)


class _TileProcessor(InternVLProcessor):
    """Pixels are SGLang's: Transformers scales an image otherwise, and chooses other tiles."""

    def __call__(self, text: Sequence[str], images: Sequence[Image.Image] | None = None, **kwargs: Any) -> Any:
        inputs = super().__call__(text, images, **kwargs)
        mean, std = (torch.tensor(each)[:, None, None] for each in (Tiles.IMAGENET_MEAN, Tiles.IMAGENET_STD))
        values = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images or ()]
        tiles = [Tiles.dynamic_preprocess((each - mean) / std, use_thumbnail=True) for each in values]
        if tiles:
            inputs["pixel_values"], inputs["num_tiles"] = torch.cat(tiles).float(), [len(each) for each in tiles]
        return inputs


def _outside(width: int, height: int, side: int = 336, patch: int = 14) -> Tensor:
    """Returns the patches of a square that hold nothing of an image centred in it, pixel by pixel."""
    scale = side / max(width, height)
    inside = torch.zeros(side, side, dtype=torch.bool)
    w, h = round(width * scale), round(height * scale)
    top, left = (side - h) // 2, (side - w) // 2
    inside[top : top + h, left : left + w] = True
    patches = inside.reshape(side // patch, patch, side // patch, patch).any(dim=3).any(dim=1)
    return ~patches.flatten()


def _grid(size: list[int]) -> tuple[int, int]:
    """Returns the (rows, columns) of crops: the resolution that wastes least of an image of (height, width)."""
    height, width = size
    best, best_fit = (0, 0), (-1, 0)
    for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)):
        h, w = rows * 336, columns * 336
        scale = min(w / width, h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        fit = (used, used - h * w)
        if fit > best_fit:
            best, best_fit = (rows, columns), fit
    return best
