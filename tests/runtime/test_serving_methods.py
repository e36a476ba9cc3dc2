"""Methods to compare with, asked for by request: each against a Hugging Face model pruned by hand."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmtok_bench.families import FAMILY_TRAITS
from mmtok_deploy.config import Coverage
from mmtok_deploy.methods import IMAGE_METHODS, MethodName
from tests.runtime.chats import Chat, small
from tests.runtime.serving import LOGPROB_TOLERANCE, Served

CUP = "What is in this cup?"
# A square has no padding in LLaVA-1.5.
IMAGE = small("coffee", 336, 336)
CHAT = Chat.ask(IMAGE, CUP)
_QWEN3 = [name for name in FAMILY_TRAITS if name.startswith("qwen3")]
_TOKENS_OF_28 = [name for name, traits in FAMILY_TRAITS.items() if traits.token_px == 28]
NUM_KEPT = {
    **dict.fromkeys(_TOKENS_OF_28, 14),
    **dict.fromkeys(_QWEN3, 10),
    "llava-1.5": 57,
    "llava-next": 3 * 57,
    # 3 x 3 tiles and a thumbnail.
    "internvl3": 64,
}
# The largest grid of the image's shape that the budget holds.
SMALLER_GRID = {**dict.fromkeys(_TOKENS_OF_28, (4, 3)), **dict.fromkeys(_QWEN3, (3, 3)), "llava-1.5": (8, 7)}


@pytest.mark.parametrize("method", IMAGE_METHODS)
def test_each_method_keeps_the_budget(served: Served, method: MethodName) -> None:
    if method in FAMILY_TRAITS[served.family].impossible_methods:
        with pytest.raises(openai.BadRequestError, match=f"mmtok_method {method} does not run on this model"):
            served.ask(CHAT, mmtok_method=method)
        return
    before = served.metric("selection_fallbacks_total")
    account = served.ask(CHAT, mmtok_method=method)
    expected = math.prod(SMALLER_GRID[served.family]) if method == "downsample" else NUM_KEPT[served.family]
    assert account["image_tokens"] == expected
    assert served.metric("selection_fallbacks_total") == before


def test_the_answer_is_that_of_the_tokens_that_the_method_keeps(served: Served) -> None:
    if served.family == "llava-next":
        pytest.skip("tile by tile the same; the judge cuts whole images by hand")
    (tokens,) = judged_tokens(served)
    num_kept = NUM_KEPT[served.family]
    even = torch.tensor([(len(tokens) - 1) * place // (num_kept - 1) for place in range(num_kept)])
    assert error(served, even, "even") < LOGPROB_TOLERANCE
    assert error(served, max_min_diverse(tokens, num_kept), "divprune") < LOGPROB_TOLERANCE
    # The answers differ: these are not the tokens of the other method.
    assert error(served, even, "divprune") > LOGPROB_TOLERANCE


def test_coverage_of_one_half_is_mmtoks(served: Served) -> None:
    halves: tuple[tuple[str, Coverage], ...] = (("text-coverage", "text"), ("vision-coverage", "vision"))
    for method, coverage in halves:
        prompt = served.judge.prompt(CHAT.for_template())
        pruned = served.judge.prune(prompt, CHAT.images, CHAT.guidance, 0.1, coverage=coverage)
        assert served.judge.max_error(pruned, served.ask(CHAT, mmtok_method=method)) < LOGPROB_TOLERANCE


def test_tokens_are_compared_by_the_side_of_the_projector_that_is_asked_for(served: Served) -> None:
    chat = Chat.ask(small("astronaut", 336, 336), "Who is it?")
    prompt = served.judge.prompt(chat.for_template())
    # By the image alone: with words, some families' tiny checkpoints keep the same tokens by either.
    by_input, by_output = (
        served.judge.prune(prompt, chat.images, chat.guidance, 0.25, coverage="vision", keys=keys)
        for keys in ("input", "output")
    )
    fields: dict[str, Any] = {"mmtok_method": "vision-coverage", "mmtok_budget": "25%"}
    asked = served.ask(chat, mmtok_keys="output", **fields)
    assert served.judge.max_error(by_output, asked) < LOGPROB_TOLERANCE
    assert served.judge.max_error(by_input, asked) > LOGPROB_TOLERANCE
    assert served.judge.max_error(by_input, served.ask(chat, mmtok_keys="input", **fields)) < LOGPROB_TOLERANCE
    with pytest.raises(openai.BadRequestError, match="mmtok_keys is one of input, output, got 'both'"):
        served.ask(chat, mmtok_keys="both")


def test_the_towers_own_attention_is_read(served: Served) -> None:
    if served.family != "llava-1.5":
        pytest.skip("one tower of this kind is held against Hugging Face's attention")
    tower = served.judge.model.model.vision_tower
    pixels = served.judge.processor.image_processor(IMAGE, return_tensors="pt")["pixel_values"]
    chosen = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = tower(pixels, output_attentions=True, output_hidden_states=True)
    finally:
        tower.set_attn_implementation(chosen)
    paid = seen.attentions[-2][0, :, 0, 1:].sum(dim=0)
    num_kept = NUM_KEPT[served.family]
    assert error(served, paid.topk(num_kept).indices.sort().values, "visionzip") < LOGPROB_TOLERANCE
    keys = seen.hidden_states[-2][0, 1:]
    assert error(served, salient_cover(keys, paid, num_kept), "scope") < LOGPROB_TOLERANCE
    # Another choice than without the attention.
    assert error(served, salient_cover(keys, torch.ones_like(paid), num_kept), "scope") > LOGPROB_TOLERANCE


def test_a_downsampled_image_is_read_as_a_smaller_one(served: Served) -> None:
    if "downsample" in FAMILY_TRAITS[served.family].impossible_methods:
        pytest.skip("refused for this family")
    account = served.ask(CHAT, mmtok_method="downsample")
    judge = served.judge
    prompt = judge.prompt(CHAT.for_template())
    if served.token_px is not None:
        columns, rows = SMALLER_GRID[served.family]
        smaller = IMAGE.resize((columns * served.token_px, rows * served.token_px), Image.Resampling.BICUBIC)
        pruned = judge.prune(prompt, [smaller], CHAT.guidance, None)
    else:
        pixels = judge.processor.image_processor(IMAGE, return_tensors="pt")["pixel_values"]
        pixels = torch.nn.functional.interpolate(pixels, (98, 112), mode="bicubic", antialias=True)
        with torch.no_grad():
            (tokens,) = judge.model.model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        pruned = judge.prune(prompt, CHAT.images, CHAT.guidance, 0.1, kept=[tokens])
    assert account["image_tokens"] == pruned.num_image_tokens
    assert judge.max_error(pruned, account) < LOGPROB_TOLERANCE


def test_random_tokens_are_the_same_again_and_others_with_another_seed(served: Served) -> None:
    first = logprobs(served.ask(CHAT, mmtok_method="random"))
    served.flush_cache()
    assert logprobs(served.ask(CHAT, mmtok_method="random")) == pytest.approx(first, abs=LOGPROB_TOLERANCE)
    other = logprobs(served.ask(CHAT, mmtok_method="random", mmtok_seed=1))
    assert other != pytest.approx(first, abs=LOGPROB_TOLERANCE)


def test_methods_share_no_cached_prefix_and_one_that_reads_no_question_shares_it_all(served: Served) -> None:
    served.flush_cache()
    first = served.ask(CHAT, mmtok_method="divprune")
    other_question = served.ask(Chat.ask(IMAGE, "How many cats?"), mmtok_method="divprune")
    other_method = served.ask(CHAT, mmtok_method="even")
    assert first["cached_tokens"] == 0
    assert other_question["cached_tokens"] >= served.from_cache(first["image_tokens"] + 1)
    assert other_method["cached_tokens"] < 120


def judged_tokens(served: Served) -> list[Tensor]:
    return served.judge.vision_tokens(served.judge.prompt(CHAT.for_template()), CHAT.images)


def error(served: Served, kept: Tensor, method: str) -> float:
    prompt = served.judge.prompt(CHAT.for_template())
    pruned = served.judge.prune(prompt, CHAT.images, CHAT.guidance, 0.1, kept=[kept])
    return served.judge.max_error(pruned, served.ask(CHAT, mmtok_method=method))


def max_min_diverse(tokens: Tensor, num_kept: int) -> Tensor:
    """The published algorithm, from the whole matrix of distances."""
    rows = tokens / tokens.norm(dim=1, keepdim=True)
    distances = 1 - rows @ rows.T
    kept = [int(distances.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(kept) < num_kept:
        kept.append(int(distances[kept].amin(dim=0).argmax()))
    return torch.tensor(sorted(kept))


def salient_cover(keys: Tensor, paid: Tensor, num_kept: int) -> Tensor:
    """SCOPE from the whole matrix of similarities."""
    rows = keys / keys.norm(dim=1, keepdim=True)
    similarity = rows @ rows.T
    kept: list[int] = []
    while len(kept) < num_kept:
        covered = similarity[:, kept].amax(dim=1, keepdim=True).clamp(min=0) if kept else 0 * rows[:, :1]
        scores = (similarity - covered).clamp(min=0).sum(dim=0) * paid
        scores[kept] = -1
        kept.append(int(scores.argmax()))
    return torch.tensor(sorted(kept))


def logprobs(account: dict[str, Any]) -> list[float]:
    return [logprob for logprob, _, _ in account["output_token_logprobs"]]
