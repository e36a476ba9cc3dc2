"""The paper's public benchmarks, by lmms-eval's names, its budgets, and what of its figures can be quoted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmtok_deploy.bench.families import Family
from mmtok_deploy.methods import MethodName

__all__ = ["BENCHMARKS", "PAPER_BUDGETS", "PUBLISHED", "Benchmark", "Published"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: lmms-eval's task, and the metrics whose sum is the score."""

    task: str
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A figure of the paper: the share of the unpruned score that is kept.

    Args:
        family: Of the model.
        model: The very one.
        benchmark: A key of `BENCHMARKS`.
        method: That chose the tokens.
        tokens: Kept; None where the text does not say.
        share: Of the unpruned score.
        is_read_off: A plot's point, measured in its picture: within a hundredth.
    """

    family: Family
    model: str
    benchmark: str
    method: MethodName
    tokens: int | None
    share: float
    is_read_off: bool = False


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

_FIGURE_TOKENS = (64, 32, 16, 8, 4, 2)
# In % of the unpruned score; None where another method's mark hides the point, or where the abstract has the figure.
_FIGURE: Mapping[tuple[str, MethodName], tuple[int | None, ...]] = {
    ("mmbench", "mmtok"): (95, 91, 84, 76, 57, 40),
    ("mmbench", "divprune"): (91, None, 82, 66, 44, 33),
    ("mmbench", "visionzip"): (92, 88, 71, 38, 28, 26),
    ("pope", "mmtok"): (99, 97, 93, 91, None, 80),
    ("pope", "divprune"): (None, 95, 81, 60, 39, 44),
    ("pope", "visionzip"): (89, 80, 60, 28, 29, 31),
    ("mme", "mmtok"): (92, 87, 83, 73, 69, 60),
    ("mme", "divprune"): (90, 86, 81, 69, 61, 53),
    ("mme", "visionzip"): (91, 84, 71, 58, 50, 48),
    ("seedbench", "mmtok"): (92, 90, 86, 80, 73, 65),
    ("seedbench", "divprune"): (91, 86, 79, 70, 62, 58),
    ("seedbench", "visionzip"): (79, 76, 70, 58, 54, 52),
}

PUBLISHED: tuple[Published, ...] = (
    Published("llava-1.5", "LLaVA-1.5-7B", "pope", "mmtok", 4, 0.877),
    Published("llava-next", "LLaVA-NeXT-13B", "pope", "mmtok", None, 0.987),
    *(
        Published("llava-1.5", "LLaVA-1.5-7B", benchmark, method, tokens, percent / 100, is_read_off=True)
        for (benchmark, method), percents in _FIGURE.items()
        for tokens, percent in zip(_FIGURE_TOKENS, percents, strict=True)
        if percent is not None
    ),
)
"""Source: MMTok, arXiv 2508.18264, abstract and Figure 1 (a). The figure does not name its model; its POPE at 4 tokens
is the abstract's of LLaVA-1.5-7B."""
