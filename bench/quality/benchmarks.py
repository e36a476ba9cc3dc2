"""The paper's public benchmarks, by lmms-eval's names, and its budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmtok_deploy.bench.families import Family

__all__ = ["BENCHMARKS", "PAPER_BUDGETS", "Benchmark"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: lmms-eval's task, and the metrics whose sum is the score."""

    task: str
    metrics: tuple[str, ...]


BENCHMARKS: Mapping[str, Benchmark] = {
    "gqa": Benchmark("gqa", ("exact_match",)),
    # The one of its kind that no other model has to judge.
    "mmbench": Benchmark("mmbench_en_dev_static", ("gpt_eval_score",)),
    "mme": Benchmark("mme", ("mme_perception_score", "mme_cognition_score")),
    "pope": Benchmark("pope", ("pope_f1_score",)),
    "scienceqa": Benchmark("scienceqa_img", ("exact_match",)),
    "vqav2": Benchmark("vqav2_val", ("exact_match",)),
    "textvqa": Benchmark("textvqa_val", ("exact_match",)),
    "mmmu": Benchmark("mmmu_val", ("mmmu_acc",)),
    "seedbench": Benchmark("seedbench", ("seed_image",)),
    "ocrbench": Benchmark("ocrbench", ("ocrbench_accuracy",)),
}
"""Tasks and metrics of lmms-eval 0.7.3. VQAv2 is its validation split: the test split's answers are not public."""

PAPER_BUDGETS: Mapping[Family, tuple[str, ...]] = {
    "llava-1.5": ("all", "192", "128", "64"),
    "llava-next": ("all", "640", "320", "160"),
    "qwen2.5-vl": ("all", "20%", "10%", "5%"),
}
"""Source: MMTok, arXiv 2508.18264, Figure 1."""
