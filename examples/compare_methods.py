"""Compares what MMTok and other pruning methods keep of the same features, by how much each covers.

python examples/compare_methods.py
"""

import torch

from mmtok_deploy import SelectionConfig, select_tokens
from mmtok_deploy.coverage import coverage_curve, coverage_matrix
from mmtok_deploy.methods import comparator
from mmtok_deploy.problem import SelectionProblem

NUM_KEPT = 32

# Vision tokens around 16 directions, and words around two of them: an image of a few things, and a question about two.
generator = torch.Generator().manual_seed(0)
things = torch.randn(16, 256, generator=generator)
kinds = torch.randint(16, (576,), generator=generator)
vision = things[kinds] + 0.5 * torch.randn(576, 256, generator=generator)
text = things[:2].repeat(4, 1) + 0.1 * torch.randn(8, 256, generator=generator)

config = SelectionConfig()
problem = SelectionProblem(vision, vision, text, NUM_KEPT)
matrix = coverage_matrix(vision, vision, text, config)
total = matrix.max(dim=1).values.sum()
print(f"{NUM_KEPT} of {len(vision)} tokens    coverage    of the two things asked about")
for name in ("mmtok", "text-coverage", "vision-coverage", "divprune", "cdpruner", "dart", "scope", "random", "even"):
    if name == "mmtok":
        selection = select_tokens(vision, vision, text, NUM_KEPT, config=config)
    else:
        (selection,) = comparator(name)([problem], config)
    covered = coverage_curve(matrix, selection.order)[-1] / total
    about = int((kinds[selection.kept] < 2).sum())
    print(f"{name:22}{float(covered):10.1%}{about:12} tokens")
