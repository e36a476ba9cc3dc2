"""SGLang's Transformers backend as a model of SGLang's own, on the embedding path that those take.

That backend hands pixels to the Hugging Face model inside the forward pass, where placeholders and features must have
equal numbers. Here images are encoded first, one by one, pruned, and their embeddings put in the placeholders' place.
On this path an image's placeholders carry its hash, so the prefix cache and chunked prefill work as they do for
SGLang's own models. SGLang switches both off for models whose class it names `Transformers...`, which these are not.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers import mm_utils
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from sglang.srt.models.transformers import EmbeddingMixin, TransformersMultiModalForCausalLM
from sglang.srt.multimodal.processors.transformers_auto import TransformersAutoMultimodalProcessor
from torch import Tensor
from typing_extensions import override

from mmtok_deploy.methods import reads_attention
from mmtok_deploy.methods.visionzip import class_token_attention
from mmtok_sglang.encoder_graphs import MAX_PATCHES, EncoderGraphs
from mmtok_sglang.feature_cache import Features
from mmtok_sglang.model import PrunedModel
from mmtok_sglang.plan import plan_of
from mmtok_sglang.processor import PrunedProcessor
from mmtok_sglang.refusals import refusal
from mmtok_sglang.stages import image_stage

__all__ = ["TransformersModel", "TransformersProcessor", "separate_images"]


class TransformersProcessor(PrunedProcessor, TransformersAutoMultimodalProcessor):
    """SGLang's processor for any model of the Transformers library.

    It gives the ids of a prompt with images, so that SGLang need not tokenise the prompt before, on the event loop and
    whatever its length.
    """

    generates_input_ids_from_raw_prompt = True

    @override
    def _apply_hf_processor(self, *args: Any, **kwargs: Any) -> Any:
        with image_stage("preprocess"):
            return super()._apply_hf_processor(*args, **kwargs)


class TransformersModel(PrunedModel, EmbeddingMixin, TransformersMultiModalForCausalLM):
    """A model of the Transformers library with a vision encoder, a projector and a language model.

    SGLang has a class of its own for embedding requests (--is-embedding); this one answers them, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Where SGLang looks for what it captures of a prefill: decoder layers, and a forward that takes its batches.
        self.model.layers = [
            SimpleNamespace(self_attn=SimpleNamespace(attn=attention))
            for attention in self.attention_instances.values()
        ]
        self.model.forward = self._forward_layers

    @override
    def pad_input_ids(self, input_ids: array[int], mm_inputs: Any) -> array[int]:
        """Returns the ids with each image's own value for its placeholders, by which the embedding path finds it."""
        padded: array[int] = mm_utils.pad_mm_tokens(input_ids, mm_inputs)
        return padded

    def get_input_embeddings(self) -> torch.nn.Module:
        """Returns the language model's input embedding."""
        embedding: torch.nn.Module = self.model.get_input_embeddings()
        return embedding

    def encode(self, items: Sequence[Any]) -> Tensor:
        """Returns the features of images, encoded one by one."""
        return torch.cat([self._encode_one(item) for item in items])

    def _encode_one(self, item: Any, *, may_replay: bool = True) -> Tensor:
        num_patches = item.feature.numel() // (3 * self.config.vision_config.patch_size**2)
        may_replay = may_replay and num_patches <= MAX_PATCHES
        with self._graphs.of(tuple(item.feature.shape) if may_replay else None):
            return super().encode([item])

    @cached_property
    def _blocks(self) -> torch.nn.ModuleList:
        # Versions of Transformers differ in what lies between the tower and its encoder.
        blocks: torch.nn.ModuleList = next(
            module.layers
            for module in self.model.vision_tower.modules()
            if isinstance(getattr(module, "layers", None), torch.nn.ModuleList)
        )
        return blocks

    @cached_property
    def _read_blocks(self) -> list[int]:
        """Indices of the blocks whose outputs the projector reads."""
        layers = self.config.vision_feature_layer
        return [self._block_of(layer) for layer in ([layers] if isinstance(layers, int) else layers)]

    @cached_property
    def _graphs(self) -> EncoderGraphs:
        return EncoderGraphs(self._blocks, self._read_blocks)

    def _block_of(self, layer: int) -> int:
        """Returns the index of the block whose output is a feature layer; these are numbered from the embeddings on."""
        return layer - 1 if layer > 0 else len(self._blocks) + layer

    def features_of(self, items: Sequence[Any]) -> list[Features]:
        """Returns what goes into the projector and what comes out of it, tile by tile."""
        return [self._features(item) for item in items]

    def _features(self, item: Any) -> Features:
        plan = plan_of(item)
        with _calls_of(self.model.multi_modal_projector) as projected:
            # Other towers than CLIP have no class token.
            has_class_token = self.config.vision_config.model_type == "clip_vision_model"
            if plan is not None and reads_attention(plan.method) and has_class_token:
                attention = self._encode_with_attention(item)
            else:
                attention = None
                self.encode([item])
        ((keys, vision),) = projected
        return Features(vision, keys, attention)

    def _encode_with_attention(self, item: Any) -> Tensor:
        """Returns [tiles, n] what the class token pays to each patch, in the layer that the projector reads."""
        attention: Any = self._blocks[self._read_blocks[-1]].self_attn
        with _calls_of(attention.q_proj) as queries, _calls_of(attention.k_proj) as keys:
            # A replay would not call them.
            self._encode_one(item, may_replay=False)
        return class_token_attention(queries[0][1], keys[0][1], attention.num_heads)

    @override
    def _forward_hidden_states(
        self, input_ids: Tensor | None, positions: Tensor, forward_batch: Any, input_embeds: Tensor | None = None
    ) -> Tensor:
        is_prefill = not forward_batch.forward_mode.is_decode()
        if input_embeds is None and is_prefill and forward_batch.contains_mm_inputs():
            input_embeds = mm_utils.prepare_mm_inputs(input_ids, forward_batch, self.model, {}, self)
        elif input_embeds is None:
            input_embeds = self.get_input_embeddings()(input_ids)
        # Its hooks run before its `forward`, which SGLang replaces while a captured prefill is replayed.
        hidden: Tensor = self.model(None, positions, forward_batch, input_embeds=input_embeds)
        return hidden

    def _forward_layers(self, _input_ids: None, positions: Tensor, forward_batch: Any, input_embeds: Tensor) -> Tensor:
        """Returns [tokens, D], the hidden states after the last layer."""
        hidden: Tensor = self.model.language_model(
            inputs_embeds=input_embeds[None],
            position_ids=positions[None],
            use_cache=False,
            return_dict=False,
            forward_batch=forward_batch,
            attention_instances=self.attention_instances,
        )[0][0]
        return hidden


def separate_images(output: Any, num_placeholders: Sequence[int]) -> None:
    """Makes `output.mm_items` one item an image, each with the span of its own placeholders.

    Args:
        output: The processor's output, with one item for all images.
        num_placeholders: The placeholders of each image: images may follow one another without a token between.

    Raises:
        ValueError: The prompt's placeholders are not those of its images (HTTP 400).
    """
    (bundle,) = output.mm_items
    places = [place for start, end in bundle.offsets for place in range(start, end + 1)]
    if len(places) != sum(num_placeholders):
        raise refusal(
            "placeholders",
            f"the prompt has {len(places)} image placeholders, its {len(num_placeholders)} images have "
            f"{sum(num_placeholders)}",
        )
    items, first = [], 0
    for index, count in enumerate(num_placeholders):
        span = places[first : first + count]
        if span[-1] - span[0] != count - 1:
            raise refusal("placeholders", f"the placeholders of image {index} are not in one piece")
        data = {name: value[index : index + 1] for name, value in bundle.model_specific_data.items()}
        items.append(
            MultimodalDataItem(
                modality=bundle.modality,
                feature=bundle.feature[index : index + 1],
                offsets=[(span[0], span[-1])],
                model_specific_data=data,
            )
        )
        first += count
    output.mm_items = items


@contextmanager
def _calls_of(module: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gives the first argument and the result of each call of a module, as they come."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    try:
        yield calls
    finally:
        hook.remove()
