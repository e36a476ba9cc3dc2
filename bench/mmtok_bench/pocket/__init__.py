"""Pocket models: small vision-language models that really see, trained from scratch on scenes drawn here.

`scenes` draws them and `questions` asks about them; `model` is what the families `llava` and `qwen` have in common, and
`words` their vocabulary; `training_data` and `training` train one. `checkpoints` holds what was trained.
"""
