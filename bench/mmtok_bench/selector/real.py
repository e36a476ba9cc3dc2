"""Runs `mmtok bench selector --features real`: checks selections on trained features, and measures the kept tokens.

For each encoder, it writes four kinds of rows: `exactness` of each backend, `work` of lazy evaluation, `close calls` of
the greedy picks in double precision, and measures of the tokens `kept` by each method at each budget.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmtok_bench.quality.plan import WITH_OUTPUT_KEYS, split_method
from mmtok_bench.results import CaseValue, make_row
from mmtok_bench.run import Run
from mmtok_bench.selector.contestants import Contestant, backends_on, contestants
from mmtok_bench.selector.real_features import ENCODERS, NUM_WORDS, EncodedImage, Encoder, encode_images, encoder_file
from mmtok_deploy.backends import lazy, reference
from mmtok_deploy.budget import Budget
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.greedy_replay import WrongPickError, replay_greedy
from mmtok_deploy.methods import IMAGE_METHODS, MethodName, comparator

__all__ = ["BENCH", "run_real_features"]

BENCH = "selector-features"

_BUDGETS = ("50%", "25%", "11%", "5%", "4")
_CONFIG = SelectionConfig()
_EXPORTED = ("onnx-lazy", "onnx-loop")
# A gain that leads the next one by less than this share of it is a close call.
_CLOSE = 1e-6
_CPU = torch.device("cpu")
# This share of an image's patches counts as salient.
_SALIENT = 0.25


def run_real_features(arguments: argparse.Namespace, device: torch.device) -> int:
    """Returns the exit code: 1 if a backend picks other tokens than the reference.

    Raises:
        ValueError: An encoder is not installed, or an argument is for synthetic features.
    """
    for name in ("shapes", "batch", "resume", "authors"):
        if getattr(arguments, name):
            raise ValueError(f"--{name} is for synthetic features, whose times are measured: drop it, or --features")
    others = [name for name in backends_on(device) if name != "reference"]
    timed = contestants(arguments.backends or [*others, *_EXPORTED], device)
    for encoder in ENCODERS:
        encoder_file(encoder)
    run = Run(BENCH, arguments.results_dir, json_output=arguments.json)
    for encoder in ENCODERS:
        run.step(f"{arguments.images} {encoder.shown}s through {encoder.package}")
        measured = _Measurement(encoder, list(encode_images(encoder, arguments.images)), device, run)
        try:
            for name, select in timed.items():
                measured.check(name, select)
        except WrongPickError as error:
            run.fail(f"{name} is wrong on a {encoder.shown} through {encoder.package}: {error}")
            return 1
        for text in _BUDGETS:
            measured.count_gains(text)
            measured.compare_methods(text)
        measured.find_close_calls()
    run.show()
    return 0


@dataclass(frozen=True, eq=False)
class _Measurement:
    """The measures of one encoder's images; each method adds rows to `run`."""

    encoder: Encoder
    images: Sequence[EncodedImage]
    device: torch.device
    run: Run

    @cached_property
    def matrices(self) -> list[Tensor]:
        """Returns each image's [NUM_WORDS + N, N] float64: MMTok's coverage of words and tokens by each token."""
        return [
            coverage_matrix(each.tokens, each.keys, each.words, _CONFIG, dtype=torch.float64) for each in self.images
        ]

    @cached_property
    def expected(self) -> list[Tensor]:
        """Returns each image's [K] picks of the reference, at the largest budget."""
        problems = [each.problem(self._num_kept(_BUDGETS[0]), self.device) for each in self.images]
        return [reference.select([problem], _CONFIG)[0].order for problem in problems]

    def check(self, name: str, select: Contestant) -> None:
        """Compares a backend's picks with the reference's.

        Raises:
            WrongPickError: A pick gains less than another token by more than rounding.
        """
        self.run.step(f"{name} against the reference")
        num_equal = num_close = 0
        num_picks = self._num_kept(_BUDGETS[0])
        for image, expected in zip(self.images, self.expected, strict=True):
            problem = image.problem(num_picks, self.device)
            (order,) = select([problem], _CONFIG)
            num_close += replay_greedy(problem, _CONFIG, order.tolist()).num_close_calls
            num_equal += torch.equal(order, expected)
        self._add("exactness", name, {"num_equal": num_equal, "num_close_calls": num_close}, num_picks=num_picks)

    def count_gains(self, budget: str) -> None:
        """Counts the gains that lazy evaluation computes."""
        num_kept = self._num_kept(budget)
        num_gains = [lazy.num_gains(each.problem(num_kept, _CPU), _CONFIG) for each in self.images]
        metrics = {"gains": statistics.fmean(num_gains), "most_gains": max(num_gains)}
        metrics["dense_gains"] = num_kept * self.encoder.num_tokens
        self._add("work", "lazy", metrics, num_picks=num_kept, budget=budget)

    def compare_methods(self, budget: str) -> None:
        """Measures what each method keeps: means over the images of its shares of coverage and of salient patches."""
        num_kept = self._num_kept(budget)
        self.run.step(f"what is kept at {budget}")
        for name in _methods(self.encoder):
            shares = [self._shares(name, num_kept, place) for place in range(len(self.images))]
            metrics = {share: statistics.fmean(each[share] for each in shares) for share in shares[0]}
            self._add("kept", "torch", metrics, method=name, num_picks=num_kept, budget=budget)

    def find_close_calls(self) -> None:
        """Measures by how much the picks lead the next best token."""
        leads = torch.cat([_leads(*each) for each in zip(self.matrices, self.expected, strict=True)])
        smallest, at_1, median = leads.quantile(leads.new_tensor([0, 0.01, 0.5])).tolist()
        metrics = {"num_leads": len(leads), "num_close": int((leads < _CLOSE).sum())}
        metrics |= {"smallest_lead": smallest, "lead_p01": at_1, "lead_p50": median}
        self._add("close calls", "reference", metrics, num_picks=self._num_kept(_BUDGETS[0]))

    def _shares(self, name: str, num_kept: int, place: int) -> dict[str, float]:
        method, keys = split_method(name)
        image, matrix = self.images[place], self.matrices[place]
        problem = image.problem(num_kept, self.device, by_output=keys == "output")
        (selection,) = comparator(method)([problem], _CONFIG)
        kept = selection.kept.cpu()
        of_kept, of_all = matrix[:, kept].amax(dim=1), matrix.amax(dim=1)
        salient = image.salience.topk(round(_SALIENT * self.encoder.num_tokens)).indices
        return {
            "covered_share": float(of_kept.sum() / of_all.sum()),
            "image_share": float(of_kept[NUM_WORDS:].sum() / of_all[NUM_WORDS:].sum()),
            "salient_share": float(torch.isin(salient, kept).double().mean()),
        }

    def _num_kept(self, budget: str) -> int:
        return Budget.parse(budget).num_kept(self.encoder.num_tokens)

    def _add(self, what: str, backend: str, metrics: Mapping[str, float], **case: CaseValue) -> None:
        of_encoder: dict[str, CaseValue] = {"encoder": self.encoder.package, "shown": self.encoder.shown}
        of_encoder |= {"num_tokens": self.encoder.num_tokens, "num_words": NUM_WORDS}
        case = {"what": what, **of_encoder, **case}
        self.run.add(make_row(BENCH, case, backend, metrics, num_runs=len(self.images), device=self.device))


def _methods(encoder: Encoder) -> list[str]:
    """Returns the methods that can run on an encoder's features; `downsample` selects no tokens."""
    left_out: set[MethodName] = {"downsample"} if encoder.attention else {"downsample", "visionzip"}
    names = [method for method in IMAGE_METHODS if method not in left_out]
    return [names[0], names[0] + WITH_OUTPUT_KEYS, *names[1:]]


def _leads(matrix: Tensor, order: Tensor) -> Tensor:
    """Returns [K], the lead of each greedy pick over the next best token, as a share of its gain; 0 for no gain."""
    covered, is_open = matrix.new_zeros(len(matrix)), torch.ones(matrix.shape[1], dtype=torch.bool)
    leads = []
    for token in order.tolist():
        gains = (matrix - covered[:, None]).clamp_(min=0).sum(dim=0).masked_fill(~is_open, -torch.inf)
        is_open[token] = False
        next_best = gains.masked_fill(~is_open, -torch.inf).max()
        leads.append((gains[token] - next_best).abs() / gains[token] if gains[token] > 0 else gains.new_zeros(()))
        covered = torch.maximum(covered, matrix[:, token])
    return torch.stack(leads)
