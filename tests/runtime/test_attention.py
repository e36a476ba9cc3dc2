"""Which methods have the class token's attention read, of which towers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mmtok_deploy.methods import MethodName
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.transformers_backend import TransformersModel

_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}


def llava(tower: str) -> Any:
    """A LLaVA with random weights, as SGLang's Transformers backend holds it."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config={"model_type": tower, **_TOWER},
        text_config={"model_type": "llama", **_TEXT},
        vision_feature_select_strategy="default" if tower == "clip_vision_model" else "full",
        image_token_index=7,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


class Held(TransformersModel):
    """What SGLang's class holds of a model, without the rest of a server."""

    def __init__(self, model: Any) -> None:
        nn.Module.__init__(self)
        self.model, self.config = model.model, model.config

    def _encode_one(self, item: Any, *, may_replay: bool = True) -> Tensor:
        (features,) = self.model.get_image_features(item.feature).pooler_output
        return features  # type: ignore[no-any-return]


def encoded(model: Any, method: MethodName) -> Any:
    item = SimpleNamespace(feature=torch.ones(1, 3, 56, 56), model_specific_data={})
    ImagePlan(num_tokens=16, num_kept=4, guidance=[], method=method).attach(item)
    with torch.no_grad():
        return Held(model)._features(item)


@pytest.mark.parametrize("method", ["scope", "visionzip"])
def test_of_clip_it_is_read(method: MethodName) -> None:
    features = encoded(llava("clip_vision_model"), method)
    assert features.attention.shape == (1, 16)
    # Shares of two heads, of which the class token keeps some itself.
    assert 0 < float(features.attention.sum()) < 2


@pytest.mark.parametrize(
    ("tower", "method"),
    [
        ("clip_vision_model", "mmtok"),
        ("clip_vision_model", "apet"),
        ("siglip_vision_model", "scope"),
        ("siglip_vision_model", "mmtok"),
    ],
)
def test_else_it_is_not(tower: str, method: MethodName) -> None:
    features = encoded(llava(tower), method)
    assert features.attention is None
    assert features.keys.shape == (1, 16, 16)


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_the_blocks_of_a_tower_are_found(tower: str) -> None:
    held = Held(llava(tower))
    assert len(held._blocks) == 3
    # Features are numbered from the embeddings on: 1 and -3 are what the first block makes.
    assert [held._block_of(layer) for layer in (1, 3, -1, -3)] == [0, 2, 2, 0]
