"""The paper's public benchmarks and budgets, and its scores of MMTok, which reports show beside measured scores.

Source: MMTok, arXiv 2508.18264, Figure 1, Tables 16 to 21, and the abstract for POPE with 4 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mmtok_bench.families import FamilyName

__all__ = ["BENCHMARKS", "PAPER_BUDGETS", "PUBLISHED", "Benchmark", "Published"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark.

    Args:
        task: lmms-eval's name.
        metrics: Metrics whose sum is the score; empty for a task that is not the paper's.
        factor: Converts the score to the paper's unit.
    """

    task: str
    metrics: tuple[str, ...]
    factor: float = 1.0


# For metrics that lmms-eval gives as a fraction and the paper in percent.
_PERCENT = 100.0

BENCHMARKS: Mapping[str, Benchmark] = {
    "gqa": Benchmark("gqa", ("exact_match",), _PERCENT),
    # The variant of MMBench whose answers no other model judges; lmms-eval gives its score in percent.
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

PAPER_BUDGETS: Mapping[FamilyName, tuple[str, ...]] = {
    "llava-1.5": ("all", "192", "128", "64"),
    "llava-next": ("all", "640", "320", "160"),
    "qwen2.5-vl": ("all", "20%", "10%", "5%"),
}
"""The budgets of Figure 1, by family."""


@dataclass(frozen=True, slots=True)
class Published:
    """One figure of the paper.

    Args:
        family: The model's family.
        model: The exact model.
        benchmark: A key of `BENCHMARKS`.
        budget: As `--mmtok-budget` has it.
        share: The score as a share of the unpruned one.
        score: Accuracy in %, POPE's F1 in %, MME's perception and cognition together; None if the paper gives none.
    """

    family: FamilyName
    model: str
    benchmark: str
    budget: str
    share: float
    score: float | None = None


_Scores = tuple[float | None, ...]
# SEED-Bench's images alone: the tables of LLaVA-1.5-7B have them for the budgets of Table 21.
_COLUMNS = ("gqa", "mmbench", "mme", "pope", "scienceqa", "vqav2", "textvqa", "mmmu", "seedbench", "ocrbench")
_TABLES: dict[tuple[FamilyName, str], dict[str, _Scores]] = {
    ("llava-1.5", "LLaVA-1.5-7B"): {
        "all": (61.90, 64.70, 1862, 85.90, 69.50, 78.50, 58.20, 36.30, 66.14, None),
        "192": (60.07, 63.40, 1773.86, 86.42, 68.76, 77.11, 57.68, 36.33, None, None),
        "128": (59.29, 62.29, 1779.14, 86.25, 68.82, 76.35, 57.03, 35.67, None, None),
        "64": (58.29, 61.17, 1715.33, 85.77, 69.16, 75.20, 56.01, 36.11, 61.29, None),
        "32": (55.95, 58.59, 1624.72, 82.95, 68.86, None, 53.70, 35.33, 59.81, None),
        "16": (53.31, 54.30, 1550.65, 79.79, 68.82, None, 50.04, 34.22, 56.67, None),
        "8": (49.06, 49.06, 1355.31, 78.46, 66.83, None, 45.71, 34.11, 52.74, None),
        # POPE: 74.84 in the table, which is 87.1%; the abstract says 87.7.
        "4": (43.93, 36.94, 1290.31, None, 65.64, None, 43.52, 34.00, 48.10, None),
        "2": (40.58, 25.69, 1122.42, 68.95, 64.90, None, 42.42, 32.67, 42.89, None),
    },
    ("llava-1.5", "LLaVA-1.5-13B"): {
        "all": (63.2, 67.7, 1818, 85.9, 72.8, 80.0, 61.3, 36.4, 66.9, None),
        "192": (59.67, 67.70, 1784.16, 86.15, 73.62, 78.30, 59.64, 36.78, 65.49, None),
        "128": (58.98, 67.18, 1756.20, 86.22, 73.38, 77.57, 59.22, 35.44, 64.26, None),
        "64": (58.42, 65.72, 1763.39, 84.39, 72.98, 76.55, 58.40, 35.22, 63.39, None),
    },
    ("llava-next", "LLaVA-NeXT-7B"): {
        "all": (64.2, 67.9, 1842, 86.4, 70.2, 80.1, 61.3, 35.1, 70.2, None),
        "640": (62.27, 65.29, 1829.28, 86.74, 68.47, 79.31, 58.97, 37.22, 67.74, None),
        "320": (60.96, 64.35, 1799.33, 85.76, 67.33, 77.68, 56.93, 38.00, 66.29, None),
        "160": (60.05, 62.97, 1715.54, 83.87, 67.97, 75.62, 54.17, 37.89, 64.54, None),
    },
    ("llava-next", "LLaVA-NeXT-13B"): {
        "all": (65.4, 70.0, 1901, 86.2, 73.5, 81.8, 64.3, 36.2, 71.9, None),
        "640": (63.71, 67.44, 1874.63, 86.72, 72.29, 80.55, 61.06, 37.11, 69.61, None),
        "320": (62.95, 65.55, 1840.10, 85.88, 72.38, 78.79, 58.88, 36.33, 67.81, None),
        "160": (61.94, 65.89, 1811.35, 85.11, 72.43, 76.8, 55.91, 37.11, 65.45, None),
    },
    ("qwen2.5-vl", "Qwen2.5-VL-7B"): {
        "all": (60.48, 83.25, 2327, 86.16, 87.46, None, 77.72, None, None, 83.80),
        "20%": (58.09, 79.30, 2217, 82.38, 81.61, None, 70.49, None, None, 59.60),
        "10%": (55.09, 74.74, 2051, 78.75, 80.47, None, 63.90, None, None, 43.60),
        "5%": (50.66, 65.89, 1796, 71.35, 77.19, None, 55.95, None, None, 30.70),
    },
}


def _rows_of(family: FamilyName, model: str, table: dict[str, _Scores]) -> Iterator[Published]:
    for budget, scores in table.items():
        for benchmark, score, unpruned in zip(_COLUMNS, scores, table["all"], strict=True):
            if score is not None and unpruned is not None:
                yield Published(family, model, benchmark, budget, score / unpruned, score)


PUBLISHED = (
    Published("llava-1.5", "LLaVA-1.5-7B", "pope", "4", 0.877),
    *(row for (family, model), table in _TABLES.items() for row in _rows_of(family, model, table)),
)
