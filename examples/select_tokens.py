"""Selects vision tokens in PyTorch: one image, a batch, and smaller budgets from the same selection.

python examples/select_tokens.py
"""

import torch

from mmtok_deploy import select_tokens

torch.manual_seed(0)
vision = torch.randn(576, 4096)  # [N, D] vision tokens after the projector
keys = torch.randn(576, 1024)  # [N, d] vision features before it
text = torch.randn(12, 4096)  # [M, D] input embeddings of the question's words

selection = select_tokens(vision, keys, text, "10%")
share = float(selection.coverage[-1] / selection.total)
print(f"{len(selection.kept)} of {len(vision)} tokens cover {share:.0%}")

# The first 20 picks are the selection for a budget of 20.
smaller = select_tokens(vision, keys, text, 20)
print("a budget of 20 is a prefix:", torch.equal(selection.order[:20], smaller.order))

# What the language model reads, in raster order.
print("kept rows:", tuple(vision[selection.kept].shape))

# A batch: images of different sizes, each with its own budget.
images = [torch.randn(n, 4096) for n in (576, 864)]
batch = select_tokens(images, [torch.randn(len(each), 1024) for each in images], [text, text], [64, "5%"])
print("a batch:", [len(each.kept) for each in batch])
