"""Runs `mmtok bench selector --features real`: checks selections on trained features, and measures the kept tokens.

It writes four kinds of rows: `exactness` of each backend, `work` of lazy evaluation, `close calls` of the greedy picks
in double precision, and measures of the tokens `kept` by each method at each budget.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtok_bench.quality.plan import WITH_OUTPUT_KEYS, split_method
from mmtok_bench.results import CaseValue, make_row
from mmtok_bench.run import Run
from mmtok_bench.selector.contestants import backends_on, contestants
from mmtok_bench.selector.real_features import NUM_TOKENS, NUM_WORDS, EncodedPhotograph, encode_photographs
from mmtok_deploy.backends import lazy, reference
from mmtok_deploy.budget import Budget
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.coverage import coverage_matrix
from mmtok_deploy.greedy_replay import WrongPickError, replay_greedy
from mmtok_deploy.methods import IMAGE_METHODS, comparator

__all__ = ["BENCH", "run_real_features"]

BENCH = "selector-features"

_BUDGETS = ("50%", "25%", "11%", "5%", "4")
_CONFIG = SelectionConfig()
_EXPORTED = ("onnx-lazy", "onnx-loop")
# A gain that leads the next one by less than this share of it is a close call.
_CLOSE = 1e-6
_CPU = torch.device("cpu")
# A quarter of an image's patches counts as salient.
_NUM_SALIENT = NUM_TOKENS // 4
# The compared methods: all except `downsample`, which selects no tokens.
_METHODS = tuple(
    name
    for method in IMAGE_METHODS
    if method != "downsample"
    for name in (method, *((method + WITH_OUTPUT_KEYS,) if method == "mmtok" else ()))
)


def run_real_features(arguments: argparse.Namespace, device: torch.device) -> int:
    """Returns the exit code: 1 if a backend picks other tokens than the reference.

    Raises:
        ValueError: The encoder is not installed, or an argument is for synthetic features.
    """
    for name in ("shapes", "batch", "resume", "authors"):
        if getattr(arguments, name):
            raise ValueError(f"--{name} is for synthetic features, whose times are measured: drop it, or --features")
    others = [name for name in backends_on(device) if name != "reference"]
    timed = contestants(arguments.backends or [*others, *_EXPORTED], device)
    photographs = list(encode_photographs(arguments.images))
    run = Run(BENCH, arguments.results_dir, json_output=arguments.json)

    def add(what: str, backend: str, metrics: Mapping[str, float], **case: CaseValue) -> None:
        case = {"what": what, "num_tokens": NUM_TOKENS, "num_words": NUM_WORDS, **case}
        run.add(make_row(BENCH, case, backend, metrics, num_runs=len(photographs), device=device))

    most = max(Budget.parse(text).num_kept(NUM_TOKENS) for text in _BUDGETS)
    problems = [photograph.problem(most, device) for photograph in photographs]
    expected = [reference.select([problem], _CONFIG)[0].order for problem in problems]
    for name, select in timed.items():
        run.step(f"{name} against the reference")
        orders = [select([problem], _CONFIG)[0] for problem in problems]
        try:
            replays = [
                replay_greedy(each, _CONFIG, order.tolist()) for each, order in zip(problems, orders, strict=True)
            ]
        except WrongPickError as error:
            run.fail(f"{name} is wrong on a photograph: {error}")
            return 1
        num_equal = sum(torch.equal(*each) for each in zip(orders, expected, strict=True))
        num_close = sum(replay.num_close_calls for replay in replays)
        add("exactness", name, {"num_equal": num_equal, "num_close_calls": num_close}, num_picks=most)
    measured = [_Measured.of(photograph) for photograph in photographs]
    for text in _BUDGETS:
        run.step(f"what is kept at {text}")
        num_kept = Budget.parse(text).num_kept(NUM_TOKENS)
        num_gains = [lazy.num_gains(photograph.problem(num_kept, _CPU), _CONFIG) for photograph in photographs]
        metrics = {"gains": statistics.fmean(num_gains), "most_gains": max(num_gains)}
        add("work", "lazy", {**metrics, "dense_gains": num_kept * NUM_TOKENS}, num_picks=num_kept, budget=text)
        for method in _METHODS:
            metrics = _kept(method, num_kept, measured, device)
            add("kept", "torch", metrics, method=method, num_picks=num_kept, budget=text)
    leads = torch.cat([_leads(each.matrix, order) for each, order in zip(measured, expected, strict=True)])
    smallest, at_1, median = leads.quantile(leads.new_tensor([0, 0.01, 0.5])).tolist()
    metrics = {"num_leads": len(leads), "num_close": int((leads < _CLOSE).sum())}
    metrics |= {"smallest_lead": smallest, "lead_p01": at_1, "lead_p50": median}
    add("close calls", "reference", metrics, num_picks=most)
    run.show()
    return 0


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """A photograph, with two measures of a selection of its tokens.

    Args:
        photograph: The photograph.
        matrix: [NUM_WORDS + N, N] float64, MMTok's coverage of words and tokens by each token, on the CPU.
        most_salient: [_NUM_SALIENT] int64, the most salient patches.
    """

    photograph: EncodedPhotograph
    matrix: Tensor
    most_salient: Tensor

    @classmethod
    def of(cls, photograph: EncodedPhotograph) -> _Measured:
        """Returns a photograph with its measures."""
        matrix = coverage_matrix(photograph.tokens, photograph.keys, photograph.words, _CONFIG, dtype=torch.float64)
        return cls(photograph, matrix, photograph.salience.topk(_NUM_SALIENT).indices)


def _kept(name: str, num_kept: int, photographs: Sequence[_Measured], device: torch.device) -> dict[str, float]:
    """Returns means over the photographs: the coverage of a method's tokens, and the share of salient patches kept."""
    method, keys = split_method(name)
    select = comparator(method)
    shares: dict[str, list[float]] = {"covered_share": [], "image_share": [], "salient_share": []}
    for each in photographs:
        (selection,) = select([each.photograph.problem(num_kept, device, by_output=keys == "output")], _CONFIG)
        kept = selection.kept.cpu()
        of_kept, of_all = each.matrix[:, kept].amax(dim=1), each.matrix.amax(dim=1)
        shares["covered_share"].append(float(of_kept.sum() / of_all.sum()))
        shares["image_share"].append(float(of_kept[NUM_WORDS:].sum() / of_all[NUM_WORDS:].sum()))
        shares["salient_share"].append(float(torch.isin(each.most_salient, kept).double().mean()))
    return {name: statistics.fmean(values) for name, values in shares.items()}


def _leads(matrix: Tensor, order: Tensor) -> Tensor:
    """Returns [K], the lead of each greedy pick over the next best token, as a share of the pick's gain."""
    covered, is_open = matrix.new_zeros(len(matrix)), torch.ones(matrix.shape[1], dtype=torch.bool)
    leads = []
    for token in order.tolist():
        gains = (matrix - covered[:, None]).clamp_(min=0).sum(dim=0).masked_fill(~is_open, -torch.inf)
        is_open[token] = False
        next_best = gains.masked_fill(~is_open, -torch.inf).max()
        leads.append((gains[token] - next_best).abs() / gains[token])
        covered = torch.maximum(covered, matrix[:, token])
    return torch.stack(leads)
