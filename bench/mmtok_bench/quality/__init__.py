"""Does pruning hurt: scores of a served model by task, method and budget.

`questions` makes the pocket tasks and `scoring` marks their answers; `plan` says what is asked, `asking` asks a server,
`sweep` runs every method and budget and `intervals` says how sure a score is; `rows` and `table` write what came out.
`lmms_eval` runs the public benchmarks, by lmms-eval in a virtual environment of its own. `command` is `mmtok quality`.
"""
