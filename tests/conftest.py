"""The same examples on every run, and as many threads as there is room for.

Hypothesis draws the same examples each time and keeps none between runs. Tests and the servers they start share the
machine's cores, where more threads than cores only wait for one another: set before PyTorch is imported.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("mmtok", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("mmtok")
