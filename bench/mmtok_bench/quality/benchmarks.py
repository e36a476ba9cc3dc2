"""The paper's public benchmarks, by lmms-eval's names, and its budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmtok_bench.families import Family

__all__ = ["BENCHMARKS", "PAPER_BUDGETS", "Benchmark"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark.

    Args:
        task: lmms-eval's name.
        metrics: Whose sum is the score; none for a task that is not the paper's.
        factor: By which the score is multiplied to be in the paper's unit.
    """

    task: str
    metrics: tuple[str, ...]
    factor: float = 1.0


# What lmms-eval gives as a fraction, and the paper in percent.
_PERCENT = 100.0

BENCHMARKS: Mapping[str, Benchmark] = {
    "gqa": Benchmark("gqa", ("exact_match",), _PERCENT),
    # The one of its kind that no other model has to judge; lmms-eval gives it in percent.
    "mmbench": Benchmark("mmbench_en_dev_static", ("gpt_eval_score",)),
    # In points.
    "mme": Benchmark("mme", ("mme_perception_score", "mme_cognition_score")),
    "pope": Benchmark("pope", ("pope_f1_score",), _PERCENT),
    "scienceqa": Benchmark("scienceqa_img", ("exact_match",), _PERCENT),
    "vqav2": Benchmark("vqav2_val", ("exact_match",), _PERCENT),
    "textvqa": Benchmark("textvqa_val", ("exact_match",), _PERCENT),
    "mmmu": Benchmark("mmmu_val", ("mmmu_acc",), _PERCENT),
    "seedbench": Benchmark("seedbench", ("seed_image",), _PERCENT),
    "ocrbench": Benchmark("ocrbench", ("ocrbench_accuracy",), _PERCENT),
}
"""Tasks and metrics of lmms-eval 0.7.3. VQAv2 is its validation split: the test split's answers are not public."""

PAPER_BUDGETS: Mapping[Family, tuple[str, ...]] = {
    "llava-1.5": ("all", "192", "128", "64"),
    "llava-next": ("all", "640", "320", "160"),
    "qwen2.5-vl": ("all", "20%", "10%", "5%"),
}
"""Source: MMTok, arXiv 2508.18264, Figure 1."""
