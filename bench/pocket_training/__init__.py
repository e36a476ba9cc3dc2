"""Trains the pocket models; `mmtok pocket` runs it in a checkout, and it is in no wheel.

`model` has what the families `llava` and `qwen` share, and `words` their vocabulary; `training` trains one on what
`training_data` and `training_pages` draw; `questions` also draws sheets of scenes. `auto_budget` calibrates the budget
auto with their rows, and `pruned_answers` asks them without a server. `mmtok_bench/pocket` has the trained models.
"""
