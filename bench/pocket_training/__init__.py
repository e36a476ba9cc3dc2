"""Trains the pocket models; `mmtok pocket` runs it in a checkout, and it is in no wheel.

`model` is what the families `llava` and `qwen` have in common, and `words` their vocabulary; `training_data` and
`training` train one; `questions` also draws sheets of scenes. `auto_budget` calibrates the budget auto on rows of
theirs, and `pruned_answers` asks them without a server. `mmtok_bench/pocket` has what was trained.
"""
