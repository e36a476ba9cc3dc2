"""Trains the pocket models; `mmtok pocket` runs it in a checkout, and it is in no wheel.

`model` has what the families `llava`, `llava_next` and `qwen` share, and `words` their words; `training` trains one
on what `training_data`, `training_pages`, `training_sizes` and `training_tiles` draw; `questions` also draws sheets of
scenes. `auto_budget` calibrates the budget auto with their rows, and `pruned_answers` asks them without a server.
`mmtok_bench/pocket` has the trained models.
"""

from __future__ import annotations

from typing import Literal

from mmtok_bench.families import PocketFamily

__all__ = ["TrainedFamily"]

TrainedFamily = Literal[PocketFamily, "llava-next"]
"""The families of which a model can be trained."""
