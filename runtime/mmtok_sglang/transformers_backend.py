"""SGLang's Transformers backend, led through the embedding path that its own models take.

That backend hands pixels to the Hugging Face model inside the forward pass, where placeholders and features must have
equal numbers. Here images are encoded first, one by one, pruned, and their embeddings put in the placeholders' place.
On this path an image's placeholders carry its hash, so the prefix cache and chunked prefill, which the backend switches
off for multimodal models because there they do not, work as they do for SGLang's own models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang.srt.managers import mm_utils
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from torch import Tensor

from mmtok_deploy.methods.visionzip import class_token_attention
from mmtok_sglang.cache_key import ImageKeys, check_embeddings, keys_of
from mmtok_sglang.feature_cache import FeatureCache, Features
from mmtok_sglang.hooks import Hook
from mmtok_sglang.placeholders import ImagePlan, plan_of
from mmtok_sglang.refusals import refusal
from mmtok_sglang.stages import StageMetrics

__all__ = ["EncodedImage", "PROCESSOR_HOOK", "SelectFeatures", "backend_hooks", "separate_images"]

PROCESSOR_HOOK = (
    "multimodal.processors.transformers_auto.TransformersAutoMultimodalProcessor.process_mm_data_async",
    "self image_data audio_data input_text request_obj **kwargs",
)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """A pruned image after the encoder: SGLang's item, its plan, features [tiles, n, ...]."""

    item: Any
    plan: ImagePlan
    features: Features

    @property
    def names(self) -> ImageKeys:
        """The image's keys."""
        keys = keys_of(self.item)
        assert keys is not None
        return keys


SelectFeatures = Callable[[Any, Sequence[EncodedImage]], list[Tensor]]
"""(model, images of a batch) -> the kept tokens [K, D] of each."""

_MIXIN = "models.transformers.MultiModalMixin"


def backend_hooks(cache: FeatureCache, select: SelectFeatures, stages: StageMetrics) -> list[Hook]:
    """Returns the hooks that lead images through the embedding path and prune them on it.

    Args:
        cache: Gives an image's features, encoded now or before.
        select: Picks the tokens of a batch's images from their features.
        stages: Times calls of the vision encoder, one an image.
    """

    def get_image_feature(original: Callable[..., Tensor], model: Any, items: list[Any]) -> list[Tensor]:
        encode = partial(stages.encode, original)
        plans = {place: plan for place, item in enumerate(items) if (plan := plan_of(item)) is not None}
        features = cache.recall(
            [items[place] for place in plans],
            lambda missing: [_encode_for_selection(encode, model, item) for item in missing],
        )
        images = [
            EncodedImage(items[place], plan, each) for (place, plan), each in zip(plans.items(), features, strict=True)
        ]
        kept = dict(zip(plans, select(model, images), strict=True))
        return [kept[place] if place in kept else _encode(encode, model, item) for place, item in enumerate(items)]

    return [
        Hook(
            "multimodal.processors.transformers_auto.TransformersAutoMultimodalProcessor.__init__",
            "self hf_config server_args _processor *args **kwargs",
            _tokenize_once,
        ),
        Hook(f"{_MIXIN}.pad_input_ids", "self input_ids mm_inputs", _pad_input_ids),
        Hook(f"{_MIXIN}.get_image_feature", "self items", get_image_feature),
        Hook(
            f"{_MIXIN}._forward_hidden_states",
            "self input_ids positions forward_batch input_embeds",
            _forward_hidden_states,
        ),
        Hook(
            "mem_cache.kv_cache_builder.build_kv_cache",
            "server_args model_config tp_worker page_size spec_algorithm enable_metrics enable_kv_cache_events "
            "enable_hierarchical_cache hicache_draft_plan dynamo_kv_event_format kv_event_lora_names draft_swa_window",
            _build_kv_cache,
        ),
        Hook("managers.scheduler.Scheduler.init_chunked_prefill", "self", _init_chunked_prefill),
    ]


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


def _tokenize_once(original: Callable[..., None], processor: Any, *args: Any, **kwargs: Any) -> None:
    """Makes the processor, and has SGLang leave prompts with images to it, which gives their ids anyway.

    SGLang would tokenise them before, on the event loop and whatever their length.

    Hooks: sglang 0.5.23 srt/multimodal/processors/transformers_auto.py TransformersAutoMultimodalProcessor.__init__;
    srt/managers/tokenizer_manager.py reads the attribute. Can go when the processor sets it itself.
    """
    original(processor, *args, **kwargs)
    processor.generates_input_ids_from_raw_prompt = True


def _pad_input_ids(_original: Callable[..., Any], _model: Any, input_ids: Any, mm_inputs: Any) -> Any:
    # The backend leaves the placeholder's own id in place; the embedding path finds an image by its pad value.
    return mm_utils.pad_mm_tokens(input_ids, mm_inputs)


def _encode_for_selection(original: Callable[..., Tensor], model: Any, item: Any) -> Features:
    """Returns what goes into the projector and what comes out of it, tile by tile; with attention where it is read."""
    plan = plan_of(item)
    with _calls_of(model.model.multi_modal_projector) as projected:
        if plan is not None and plan.method == "visionzip":
            attention = _encode_with_attention(original, model, item)
        else:
            attention = None
            _encode(original, model, item)
    ((keys, vision),) = projected
    return Features(vision, keys, attention)


def _encode_with_attention(original: Callable[..., Tensor], model: Any, item: Any) -> Tensor:
    """Returns [tiles, n] what the class token pays to each patch in the layer whose features the projector reads."""
    layer = model.config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    # Features are numbered from the embeddings on, which come before layer 0.
    attention = model.model.vision_tower.encoder.layers[layer if layer < 0 else layer - 1].self_attn
    with _calls_of(attention.q_proj) as queries, _calls_of(attention.k_proj) as keys:
        _encode(original, model, item)
    return class_token_attention(queries[0][1], keys[0][1], attention.num_heads)


@contextmanager
def _calls_of(module: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gives the first argument and the result of each call of a module, as they come."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    try:
        yield calls
    finally:
        hook.remove()


def _encode(original: Callable[..., Tensor], model: Any, item: Any) -> Tensor:
    data = item.model_specific_data
    # The backend passes everything on the item to the Hugging Face encoder as an argument: show it the model's own.
    item.model_specific_data = {name: value for name, value in data.items() if not name.startswith("mmtok")}
    try:
        return original(model, [item])
    finally:
        item.model_specific_data = data


def _forward_hidden_states(
    original: Callable[..., Tensor],
    model: Any,
    input_ids: Tensor | None,
    positions: Tensor,
    forward_batch: Any,
    input_embeds: Tensor | None = None,
) -> Tensor:
    prefill = input_embeds is None and not forward_batch.forward_mode.is_decode()
    if prefill and forward_batch.contains_mm_inputs():
        check_embeddings(forward_batch)
        input_embeds = mm_utils.prepare_mm_inputs(input_ids, forward_batch, model.model, {}, model)
        input_ids = None
    return original(model, input_ids, positions, forward_batch, input_embeds)


def _build_kv_cache(original: Callable[..., Any], **arguments: Any) -> Any:
    with _not_multimodal(arguments["model_config"]):
        return original(**arguments)


def _init_chunked_prefill(original: Callable[..., None], scheduler: Any) -> None:
    with _not_multimodal(scheduler.model_config):
        original(scheduler)


@contextmanager
def _not_multimodal(model_config: Any) -> Iterator[None]:
    """Keeps two functions of the scheduler's start from switching off what the embedding path makes safe.

    Both ask `model_config.is_multimodal` for that purpose alone.
    """
    model_config.is_multimodal = False
    try:
        yield
    finally:
        model_config.is_multimodal = True
