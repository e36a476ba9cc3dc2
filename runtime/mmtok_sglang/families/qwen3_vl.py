"""Qwen3-VL, dense and mixture of experts, on SGLang's own implementation: tokens with what DeepStack adds to layers.

The encoder returns rows of H x (1 + levels): a token as the language model reads it, and behind it what its first
layers get added at the token's place, a part a layer (DeepStack). Tokens are selected by their first H values, and rows
are kept whole, so that the levels of a kept token go to its place and no other's do.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import is_in_breakable_cuda_graph
from sglang.srt.model_loader.utils import resolve_language_model
from sglang.srt.models import qwen3_vl, qwen3_vl_moe
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from torch import Tensor, nn

from mmtok_sglang.families.qwen import QwenModel, QwenProcessor, QwenWithTimestamps

__all__ = ["Qwen3VL", "Qwen3VLMoe"]

# SGLang 0.5.23 models/qwen3_vl_moe.py, `Qwen3MoeLLMModel.__init__`: as many layers are given levels, whatever the
# configuration says.
_MOE_LEVELS = 3


class _DeepStackModel(QwenModel):
    """A model whose captured prefills add DeepStack's levels.

    SGLang 0.5.23 captures the language model without levels (srt/model_executor/runner/prefill_cuda_graph_runner.py,
    `_run_forward`), so a replay would leave out those of its images. Captured here is an addition of rows of one
    tensor, which every prefill fills before its replay: with its images' levels, or with zeros.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._captured_levels: Tensor | None = None
        language_model = resolve_language_model(self)
        run = language_model.forward

        @wraps(run)
        def run_with_levels(*args: Any, **kwargs: Any) -> Any:
            embeddings = kwargs.get("input_embeds")
            if embeddings is not None and is_in_breakable_cuda_graph():
                kwargs["input_deepstack_embeds"] = self._levels_to_capture(embeddings)
            return run(*args, **kwargs)

        # A replay takes the place of this method, so that it runs in captures alone, and without graphs.
        language_model.forward = run_with_levels
        language_model.register_forward_pre_hook(self._fill_captured_levels, with_kwargs=True)

    def _levels_to_capture(self, embeddings: Tensor) -> Tensor:
        """Returns [tokens, H x levels] rows of the tensor that replays read.

        Raises:
            RuntimeError: A capture of more tokens than the first one.
        """
        if self._captured_levels is None:
            # Made by the warm-up before the first capture, which is that of the most tokens.
            self._captured_levels = embeddings.new_zeros(
                len(embeddings), self.num_deepstack_embeddings * embeddings.shape[1]
            )
        if len(embeddings) > len(self._captured_levels):
            raise RuntimeError(
                f"MMTok: a prefill of {len(embeddings)} tokens is captured after one of {len(self._captured_levels)}: "
                "expected the largest first. Start the server with --disable-prefill-cuda-graph"
            )
        return self._captured_levels[: len(embeddings)]

    def _fill_captured_levels(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured, embeddings = self._captured_levels, kwargs.get("input_embeds")
        if captured is None or embeddings is None or len(embeddings) > len(captured):
            return
        levels = kwargs.get("input_deepstack_embeds")
        if levels is None:
            captured[: len(embeddings)].zero_()
        else:
            captured[: len(embeddings)].copy_(levels)


class Qwen3VLForConditionalGeneration(_DeepStackModel, qwen3_vl.Qwen3VLForConditionalGeneration):
    """The model."""


class Qwen3VLMoeForConditionalGeneration(_DeepStackModel, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """The model with a mixture of experts."""


class Qwen3VLProcessor(QwenProcessor, QwenVLImageProcessor):
    """The processor of both."""

    models: ClassVar[list[type]] = [Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration]


class Qwen3VL(QwenWithTimestamps):
    """Tokens of 32 x 32 pixels."""

    model_class = Qwen3VLForConditionalGeneration
    speculative_algorithms = ("NGRAM", "EAGLE3")
    processor_class = Qwen3VLProcessor
    replays_prefills = True

    def obstacle_to_stages(self, num_stages: int, config: Any) -> str | None:
        """Returns why a pipeline would lose levels: the first stage alone is given them.

        SGLang 0.5.23 ends the start of a dense model (models/qwen3_vl.py, `Qwen3LLMModel.__init__`), and serves a
        mixture of experts without them.
        """
        num_layers, num_levels = config.text_config.num_hidden_layers, _num_levels(config)
        _, end = get_pp_indices(num_layers, 0, num_stages)
        if end >= num_levels:
            return None
        return (
            f"DeepStack adds to its first {num_levels} layers, and the first stage would have {end} of {num_layers}: "
            "take fewer stages, or share layers out by SGLANG_PP_LAYER_PARTITION"
        )


class Qwen3VLMoe(Qwen3VL):
    """The same encoder and positions before a mixture of experts."""

    model_class = Qwen3VLMoeForConditionalGeneration

    def obstacle(self, config: Any) -> str | None:
        """Returns why a model of this architecture cannot be pruned: SGLang would lose levels, or look for more."""
        if _num_levels(config) != _MOE_LEVELS:
            return f"it has {_num_levels(config)} levels of DeepStack, and SGLang adds {_MOE_LEVELS}"
        return super().obstacle(config)


def _num_levels(config: Any) -> int:
    return len(config.vision_config.deepstack_visual_indexes)
