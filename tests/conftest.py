"""Hypothesis draws the same examples on every run, and keeps none between runs."""

from hypothesis import settings

settings.register_profile("mmtok", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("mmtok")
