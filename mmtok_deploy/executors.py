"""Executors run the selection in a server: by PyTorch, or from an exported file."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from mmtok_deploy.backends import BackendName, fastest_backend, get_backend
from mmtok_deploy.backends.blocked import max_matrix_bytes, within_memory
from mmtok_deploy.backends.triton_plan import FeatureTypes
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.engine_check import hold_to_reference, sample_problems
from mmtok_deploy.engines import Engine, EngineError, open_engine
from mmtok_deploy.greedy_replay import WrongPickError
from mmtok_deploy.manifest import Manifest
from mmtok_deploy.problem import Selection, SelectionProblem
from mmtok_deploy.synthetic import synthetic_features

__all__ = ["EngineExecutor", "Executor", "ExecutorName", "TorchExecutor", "check_selection", "make_executor"]

logger = logging.getLogger(__name__)

ExecutorName = Literal["auto", "torch", "triton", "onnxruntime", "tensorrt"]

# Tokens of the synthetic image that is selected from before the first request.
_SAMPLE_TOKENS = 576


class Executor(Protocol):
    """Selects tokens for a batch of problems on one device, without synchronizing."""

    @property
    def name(self) -> str:
        """Backend or file, library and device, for the log."""

    def select(self, problems: Sequence[SelectionProblem]) -> list[Selection]:
        """Returns the selection of each problem, in the same order.

        Raises:
            EngineError: A problem outside the exported file's sizes.
        """


def make_executor(
    name: ExecutorName,
    device: torch.device,
    config: SelectionConfig,
    engine_file: Path | None = None,
    provider: str | None = None,
    engine_sha256: str | None = None,
) -> TorchExecutor | EngineExecutor:
    """Returns the executor of that name, ready to run.

    Args:
        name: "auto" is the exported file if there is one, else the fastest backend on the device; "torch" is the
            fastest one that needs PyTorch alone.
        device: Device of the features.
        config: Temperatures, weight, coverage; an exported file has its own, which must be these.
        engine_file: The exported file, for "onnxruntime" and "tensorrt".
        provider: ONNX Runtime's provider; by default that of the device.
        engine_sha256: Checksum that the file must have; None accepts any file that matches its manifest.

    Raises:
        ArtifactError: The exported file is damaged, or has another checksum than `engine_sha256`.
        EngineError: The exported file cannot run here, or was exported for something else.
        ValueError: A name that needs a file without one, a file with a name that runs none, or Triton on a device
            that it does not support.
    """
    if name in ("onnxruntime", "tensorrt") and engine_file is None:
        raise ValueError(f"the backend {name} runs an exported file: name it")
    if engine_file is None or name in ("torch", "triton"):
        if engine_file is not None or provider is not None:
            raise ValueError(f"the backend {name} runs no exported file")
        if name == "torch":
            return TorchExecutor(fastest_backend(device.type, None, has_triton=False), device, config)
        return TorchExecutor("triton" if name == "triton" else "auto", device, config)
    engine = open_engine(engine_file, device, provider, engine_sha256)
    runs = "onnxruntime" if engine.manifest.format == "onnx" else "tensorrt"
    if name not in ("auto", runs):
        raise ValueError(f"{engine_file.name} is run by {runs}, not by {name}")
    return EngineExecutor(engine, device, config)


class TorchExecutor:
    """Runs one of the backends, with memory bounded as in `backends/blocked.py`.

    Args:
        backend: Name of the backend.
        device: Device of the features.
        config: Temperatures, weight, coverage.
    """

    def __init__(self, backend: BackendName, device: torch.device, config: SelectionConfig) -> None:
        self._backend = get_backend(backend, device)
        if backend != "auto":  # whose memory is bounded already
            self._backend = within_memory(self._backend, max_bytes=max_matrix_bytes(device))
        self._config = config
        self._device = device
        self._runs = self._backend.__module__.rpartition(".")[2]
        self.name = f"torch ({self._runs}) on {device}"

    def prepare(self, types: FeatureTypes, tokens: tuple[int, int]) -> None:
        """Warms up, so that no request waits for it: compiles kernels, and selects from synthetic features.

        Args:
            types: Dtypes and widths of the features.
            tokens: The fewest and the most tokens of an image.
        """
        # A larger image is selected from by blocks, without Triton kernels.
        most = min(tokens[1], math.isqrt(max_matrix_bytes(self._device) // 4))
        fewest = min(tokens[0], most)
        if self._runs == "triton":
            from mmtok_deploy.backends.triton import load_kernels

            load_kernels(types, self._config, self._device, (fewest, most))
        num_tokens = min(most, _SAMPLE_TOKENS)
        vision, keys, text = (
            feature.to(self._device, dtype)
            for feature, dtype in zip(
                synthetic_features(num_tokens, 8, types.vision_width, types.keys_width),
                (types.vision, types.keys, types.vision),
                strict=True,
            )
        )
        excluded = torch.zeros(num_tokens, dtype=torch.bool, device=self._device)
        sample = SelectionProblem(vision, keys, text, max(1, num_tokens // 9), excluded)
        # One image, and a batch: the two take different paths through PyTorch.
        for batch in ([sample], [sample, replace(sample, excluded=None)]):
            self.select(batch)[-1].total.item()

    def select(self, problems: Sequence[SelectionProblem]) -> list[Selection]:
        """See `Executor.select`."""
        return self._backend(problems, self._config)


class EngineExecutor:
    """Runs an exported selection. For fewer picks than the file makes, it takes the first: greedy budgets are nested.

    Args:
        engine: The loaded file.
        device: Device of the features.
        config: Temperatures, weight, coverage of the server.

    Raises:
        EngineError: The file holds more than a selection, has other constants, or takes no single image.
    """

    def __init__(self, engine: Engine, device: torch.device, config: SelectionConfig) -> None:
        manifest = engine.manifest
        file = manifest.files[0].name
        if manifest.kind != "selection":
            raise EngineError(f"{file} holds an encoder as well, a server has its own: mmtok export selection")
        if manifest.share:
            raise EngineError(
                f"{file} keeps {manifest.share} by itself, a server asks for a number: export it with --budget-input"
            )
        if manifest.constants != config:
            raise EngineError(f"{file} was exported with {manifest.constants}, the server has {config}")
        if 1 not in manifest.dimensions["B"]:
            raise EngineError(f"{file} takes {manifest.dimensions['B']} images at a time, never one: --batch 1:8")
        self.name = f"{file} by {engine.name}"
        self.manifest = manifest
        self._engine = engine
        self._device = device

    def select(self, problems: Sequence[SelectionProblem]) -> list[Selection]:
        """See `Executor.select`."""
        selections: dict[int, Selection] = {}
        for group in self._groups(problems):
            outputs = self._engine.run(self._inputs([problems[idx] for idx in group]))
            for row, idx in enumerate(group):
                image = {name: tensor[row] for name, tensor in outputs.items()}
                selections[idx] = _selection(image, problems[idx].num_picks)
        return [selections[idx] for idx in range(len(problems))]

    def check(self) -> None:
        """Selects from synthetic features, as a batch and one by one, and checks the picks against the reference.

        Raises:
            EngineError: The file does not run, or selects other tokens.
        """
        export = self.manifest.check
        if export.status != "passed":
            logger.warning(
                "MMTok: %s was not checked at export (%s); it is checked now, on one sample",
                self.manifest.files[0].name,
                export.detail,
            )
        try:
            problems = sample_problems(self.manifest, self._device)
            runs = [problems, *([problem] for problem in problems)]
            results = [result for each in runs for result in zip(each, self.select(each), strict=True)]
        except EngineError:
            raise
        except Exception as error:  # a broken file may raise anything
            raise EngineError(f"{self.name} does not run: {type(error).__name__}: {error}") from error
        for problem, selection in results:
            try:
                hold_to_reference(problem, self.manifest.constants, selection)
            except WrongPickError as error:
                raise EngineError(
                    f"{self.name} does not select as the reference does ({error}): export it again"
                ) from error

    def _groups(self, problems: Sequence[SelectionProblem]) -> list[list[int]]:
        """Returns the indices of problems that run together: equal in size, at most as many as the file takes."""
        by_size: dict[int, list[int]] = {}
        for idx, problem in enumerate(problems):
            if problem.num_picks > self.manifest.budget:
                file = self.manifest.files[0].name
                raise EngineError(f"{file} keeps {self.manifest.budget} tokens, asked for were {problem.num_picks}")
            by_size.setdefault(len(problem.vision), []).append(idx)
        most = self.manifest.dimensions["B"].maximum
        return [group[first : first + most] for group in by_size.values() for first in range(0, len(group), most)]

    def _inputs(self, problems: list[SelectionProblem]) -> dict[str, Tensor]:
        num_words = max(self.manifest.dimensions["M"].minimum, *(len(problem.text) for problem in problems))
        dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in self.manifest.inputs}
        first = problems[0]
        text = torch.zeros(
            len(problems), num_words, first.vision.shape[1], dtype=dtypes["text"], device=first.vision.device
        )
        text_mask = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
        excluded = torch.zeros(len(problems), len(first.vision), dtype=torch.bool, device=text.device)
        for row, problem in enumerate(problems):
            text[row, : len(problem.text)] = _exactly(problem.text, dtypes["text"])
            text_mask[row, : len(problem.text)] = True
            if problem.excluded is not None:
                excluded[row] = problem.excluded
        budget = torch.tensor([max(1, problem.num_picks) for problem in problems])
        return ({"budget": budget} if self.manifest.takes_budget else {}) | {
            "vision": _stack([problem.vision for problem in problems], dtypes["vision"]),
            "keys": _stack([problem.keys for problem in problems], dtypes["keys"]),
            "text": text,
            "text_mask": text_mask,
            "excluded": excluded,
        }


def check_selection(manifest: Manifest, num_tokens: int, num_kept: int, num_words: int) -> None:
    """Raises ValueError (HTTP 400) if this selection from one image or tile is outside the exported file's sizes.

    Args:
        manifest: The file's manifest.
        num_tokens: N.
        num_kept: K.
        num_words: Guidance tokens; fewer than the file's smallest number are padded.
    """
    sizes = manifest.dimensions
    if num_tokens not in sizes["N"]:
        raise ValueError(f"the server's exported selection takes images of {sizes['N']} tokens, this has {num_tokens}")
    if num_words > sizes["M"].maximum:
        raise ValueError(
            f"the server's exported selection takes {sizes['M']} tokens of guidance, this image has {num_words}: "
            "shorten the question, or send mm_processor_kwargs.mmtok_guidance"
        )
    if num_kept > manifest.budget:
        raise ValueError(
            f"the server's exported selection keeps at most {manifest.budget} tokens, asked for were {num_kept}: "
            "ask for a smaller mmtok_budget"
        )


def _stack(features: list[Tensor], dtype: torch.dtype) -> Tensor:
    # One image is not copied.
    stacked = features[0][None] if len(features) == 1 else torch.stack(features)
    return _exactly(stacked, dtype)


def _exactly(features: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in (features.dtype, torch.float32):
        raise EngineError(f"the file takes {dtype}, and {features.dtype} would be rounded: export it with --dtype")
    return features.to(dtype)


def _selection(image: dict[str, Tensor], num_picks: int) -> Selection:
    order = image["order"][:num_picks]
    kept = image["kept"] if num_picks == len(image["kept"]) else order.sort().values
    return Selection(order, kept, image["coverage"][:num_picks], image["total"])
