"""FastV and SparseVLM against plain references, and with all tokens against the model itself."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtok_bench.families import PocketFamily
from mmtok_bench.pocket import PICTURE_PX
from mmtok_bench.pocket.questions import make_scenes, picture_of
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.quality.plan import METHODS_INSIDE
from pocket_training.pruned_answers import PocketModel
from pocket_training.pruning_inside import (
    last_hidden_after_fastv,
    last_hidden_after_sparsevlm,
    merge_similar,
    raters,
)


class Attention(torch.nn.Module):
    """Returns its input, and given weights."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, self.weights[None]


class Layer(torch.nn.Module):
    """Returns its input, and notes it."""

    def __init__(self, weights: Tensor, seen: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.self_attn = Attention(weights)
        self.seen = seen

    def forward(self, hidden: Tensor, attention_mask: Tensor, position_embeddings: Tensor) -> Tensor:
        assert attention_mask.shape[-1] == hidden.shape[1] == position_embeddings.shape[-1]
        self.seen.append((hidden[0], position_embeddings[0]))
        return self.self_attn(hidden)[0]  # type: ignore[no-any-return]


def model_of(weights: list[Tensor], seen: list[tuple[Tensor, Tensor]]) -> SimpleNamespace:
    layers = [Layer(of_layer, seen) for of_layer in weights]
    return SimpleNamespace(layers=layers, norm=lambda x: x, rotary_emb=lambda _, places: places)


@pytest.mark.parametrize("method", METHODS_INSIDE)
@pytest.mark.parametrize("family", get_args(PocketFamily))
def test_with_all_tokens_it_is_the_model(family: PocketFamily, method: str) -> None:
    model, (asked,) = PocketModel(family), make_scenes(3, 1)[:1]
    picture = picture_of(asked.scene, PICTURE_PX.get(family, SCENE_PX))
    encoded, inputs = model.selector.encode(picture), model.read(picture, asked.questions[0].text)
    every = torch.arange(len(encoded.vision))
    (ids,) = inputs["input_ids"]
    start = int((ids == model._model.config.image_token_id).nonzero()[0])
    image, embed = slice(start, start + len(every)), model._model.get_input_embeddings()
    with torch.inference_mode():
        rows = torch.cat([embed(ids[:start]), encoded.vision, embed(ids[image.stop :])])
        positions, _ = model._positions(inputs, torch.arange(len(ids)))
        whole = model._last_hidden(rows, positions, image, None, len(rows))
        kept_all, kept_few = (
            model._last_hidden(rows, positions, image, (method, kept), len(rows)) for kept in (len(every), 4)
        )
    torch.testing.assert_close(kept_all, whole, rtol=1e-4, atol=1e-4)
    assert (kept_few - whole).abs().max() > 1e-2


def test_fastv_keeps_what_receives_the_most_attention() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    weights = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)).tril()
    # Two words, five tokens of an image, a word, and the first word of an answer.
    rows = torch.arange(9.0)[:, None]
    model = model_of([weights] * 3, seen)
    last = last_hidden_after_fastv(model, rows, torch.arange(9)[None], slice(2, 7), 2, num_prompt=8)
    received = [float(weights[:, :8, token].mean()) for token in range(2, 7)]
    kept = sorted(sorted(range(5), key=lambda token: -received[token])[:2])
    assert [each.flatten().tolist() for each, _ in seen[:2]] == [list(range(9))] * 2
    assert seen[2][0].flatten().tolist() == seen[2][1].tolist() == [0, 1, *(2 + token for token in kept), 7, 8]
    assert last.tolist() == [8]


def test_sparsevlm_keeps_what_its_raters_look_at_and_merges_the_best_of_the_rest() -> None:
    """Four layers: tokens are dropped after the first and after the second."""
    seen: list[tuple[Tensor, Tensor]] = []
    rng = np.random.default_rng(0)
    # Two words, 100 tokens of an image, three words of which the second is like the image, and a word of an answer.
    image, num_prompt, length = slice(2, 102), 105, 106
    rows = torch.from_numpy(rng.normal(size=(length, 8)).astype(np.float32))
    rows[image] += 1
    rows[102:105] = torch.tensor([[-1.0], [2.0], [-1.0]])
    weights = [torch.from_numpy(rng.random((2, length, length)).astype(np.float32)) for _ in range(4)]
    positions = torch.arange(length)[None]
    last_hidden_after_sparsevlm(model_of(weights, seen), rows, positions, image, 25, num_prompt)
    assert [len(hidden) for hidden, _ in seen] == [6 + num for num in (100, 50, 25, 25)]

    rated = weights[0][:, 103, image].mean(0).numpy()
    order = np.argsort(-rated, kind="stable")
    # 50 are read: 48 and 2 merged ones, of the best 16 of 52 dropped ones (30%, and one).
    best, recycled = np.sort(order[:48]), np.sort(order[48 : 48 + 16])
    hidden, places = seen[1]
    np.testing.assert_array_equal(hidden[2:50], rows[image][best])
    np.testing.assert_array_equal(places[2:50], 2 + best)
    merged, centres = merge_similar(rows[image][torch.from_numpy(recycled)], 2)
    torch.testing.assert_close(hidden[50:52], merged)
    np.testing.assert_array_equal(places[50:52], 2 + recycled[centres])
    np.testing.assert_array_equal(hidden[52:], rows[102:])
    np.testing.assert_array_equal(places[52:], np.arange(102, 106))
    # The rater stands after fewer tokens in the second layer: its row there is 53.
    rated = weights[1][:, 53, 2:52].mean(0).numpy()
    second = np.sort(np.argsort(-rated, kind="stable")[:24])
    np.testing.assert_array_equal(seen[2][0][2:26], hidden[2:52][second])


def test_raters_are_the_words_most_like_the_image() -> None:
    rng = np.random.default_rng(1)
    vision, text = (rng.normal(size=(num, 6)).astype(np.float32) for num in (40, 9))
    shares = np.exp(vision.astype(float) @ text.T)
    shares = (shares / shares.sum(1, keepdims=True)).mean(0)
    expected = np.flatnonzero(shares >= shares.mean())
    assert raters(torch.from_numpy(vision), torch.from_numpy(text)).tolist() == expected.tolist()
    assert 0 < len(expected) < 9
    assert raters(torch.ones(4, 3), torch.ones(5, 3)).tolist() == list(range(5))


def test_clusters_against_a_plain_reference() -> None:
    rng = np.random.default_rng(2)
    hidden = np.concatenate([rng.normal(size=(7, 5)) + 8 * rng.normal(size=5) for _ in range(3)]).astype(np.float32)
    distance = np.sqrt(((hidden[:, None] - hidden[None]).astype(float) ** 2).sum(-1)) / 5**0.5
    density = np.exp(-(np.sort(distance, axis=1)[:, :3] ** 2).mean(1))
    denser = [[j for j in range(21) if density[j] > density[i]] for i in range(21)]
    apart = [distance[i, denser[i]].min() if denser[i] else distance.max() for i in range(21)]
    centres = np.sort(np.argsort(-density * np.array(apart))[:3])
    nearest = distance[:, centres].argmin(1)
    expected = np.stack([hidden[nearest == cluster].mean(0) for cluster in range(3)])
    means, found = merge_similar(torch.from_numpy(hidden), 3)
    assert found.tolist() == centres.tolist()
    # The three clouds are found.
    assert sorted(nearest.tolist()) == [0] * 7 + [1] * 7 + [2] * 7
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-5)


def test_equal_tokens_are_merged_into_themselves() -> None:
    means, centres = merge_similar(torch.ones(6, 4), 2)
    torch.testing.assert_close(means, torch.ones(2, 4))
    assert len(set(centres.tolist())) == 2
