"""Which prefills are captured on a GPU, decided without one; what a replay answers is in `test_serving_chunks.py`."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs import model_config
from sglang.srt.model_executor.cuda_graph_config import Backend
from torch import Tensor, nn

from mmtok_sglang import prefill_graphs, server_args
from mmtok_sglang.families import FAMILIES, qwen3_vl
from mmtok_sglang.prefill_graphs import CAPTURED_TOKENS, prefer_prefill_graphs
from tests.runtime.test_server_args import parsed


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graphs, "is_cuda", lambda: True)


def sizes(*flags: str) -> list[int] | None:
    arguments = parsed("--mmtok-budget=10%", *flags)
    prefer_prefill_graphs(arguments)
    chosen: list[int] | None = resolving_view(arguments).cuda_graph_bs_prefill
    return chosen


def test_later_qwens_are_captured_and_no_llava() -> None:
    prefer_prefill_graphs(parsed("--mmtok-budget=10%"))
    allowed = model_config.multimodal_breakable_cuda_graph_supported_model_archs
    captured = {name for name, family in FAMILIES.items() if family.architecture in allowed}
    assert captured == {name for name in FAMILIES if name.startswith(("qwen2.5", "qwen3"))}
    # Once each, however often arguments are resolved.
    assert [allowed.count(FAMILIES[name].architecture) for name in captured] == [1] * 5


def test_the_sizes_are_those_of_pruned_prompts() -> None:
    assert sizes() == list(CAPTURED_TOKENS)
    assert sizes("--chunked-prefill-size=-1") == list(CAPTURED_TOKENS)
    assert sizes("--chunked-prefill-size=100") == [8, 16, 32, 64, 96]
    assert sizes("--max-total-tokens=20") == [8, 16]
    # SGLang pads a batch to twice its tokens at most: from 4 tokens on, each finds a size.
    assert all(larger <= 2 * (smaller + 1) for smaller, larger in pairwise(CAPTURED_TOKENS))


@pytest.mark.parametrize(
    "flags",
    [
        ("--disable-cuda-graph",),
        ("--disable-prefill-cuda-graph",),
        ("--cuda-graph-backend-prefill=disabled",),
        ("--cuda-graph-max-bs-prefill=512",),
        ('--cuda-graph-config={"prefill": {"backend": "disabled"}}',),
    ],
)
def test_a_users_choice_wins(flags: tuple[str, ...]) -> None:
    assert sizes(*flags) is None


def test_a_users_sizes_win() -> None:
    assert sizes("--cuda-graph-bs-prefill", "7") == [7]


def test_the_log_says_once_what_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    prefill = SimpleNamespace(backend=Backend.BREAKABLE, bs=[8, 96])
    arguments = SimpleNamespace(cuda_graph_config=SimpleNamespace(prefill=prefill))
    prefill_graphs.log_prefill_graphs(arguments)
    prefill_graphs.log_prefill_graphs(arguments)
    for _ in range(2):
        server_args._advise_tokenizers()
    graphs, tokenizers = caplog.messages
    assert "up to 96 tokens run as CUDA graphs of 2 sizes" in graphs
    assert "--tokenizer-worker-num 4" in tokenizers


def test_without_a_gpu_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graphs, "is_cuda", lambda: False)
    assert sizes() is None


class TestDeepStack:
    """The tensor that a captured prefill reads DeepStack's levels from."""

    class LanguageModel(nn.Module):
        def forward(self, *, input_embeds: Tensor, input_deepstack_embeds: Tensor | None = None) -> Tensor:
            return input_embeds if input_deepstack_embeds is None else input_embeds + input_deepstack_embeds[:, :2]

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TestDeepStack.LanguageModel()
            self.num_deepstack_embeddings = 3

    @pytest.fixture
    def model(self) -> Any:
        return type("Model", (qwen3_vl._DeepStackModel, self.Base), {})()

    def test_a_replay_adds_its_own_images_levels_and_no_others(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        language_model, embeddings = model.model, torch.zeros(4, 2)
        monkeypatch.setattr(qwen3_vl, "is_in_breakable_cuda_graph", lambda: True)
        language_model.forward(input_embeds=embeddings)
        monkeypatch.undo()
        captured, capture = model._captured_levels, language_model.forward
        assert captured.shape == (4, 6)
        # What SGLang puts in its place: a replay, which reads what was captured.
        language_model.forward = lambda *, input_embeds, **_: captured[: len(input_embeds), :2].clone()
        levels = torch.arange(18.0).reshape(3, 6)
        assert torch.equal(language_model(input_embeds=torch.zeros(3, 2), input_deepstack_embeds=levels), levels[:, :2])
        assert language_model(input_embeds=torch.zeros(3, 2)).eq(0).all()
        # Without a graph, of more tokens than were captured, or in between.
        language_model.forward = capture
        many = torch.ones(5, 6)
        assert language_model(input_embeds=torch.zeros(5, 2), input_deepstack_embeds=many).eq(1).all()
        assert language_model(input_embeds=torch.zeros(2, 2), input_deepstack_embeds=many[:2]).eq(1).all()
        assert language_model(input_embeds=torch.zeros(2, 2)).eq(0).all()

    def test_the_largest_is_captured_first(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(qwen3_vl, "is_in_breakable_cuda_graph", lambda: True)
        model.model.forward(input_embeds=torch.zeros(2, 2))
        with pytest.raises(RuntimeError, match=r"of 3 tokens is captured after one of 2: .*--disable-prefill"):
            model.model.forward(input_embeds=torch.zeros(3, 2))
