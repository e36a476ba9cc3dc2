"""`mmtok quality`: scores of a served model by task, method and budget.

`bench` runs it. On the pocket tasks, `plan` says what is asked and keeps every answer, `sweep` asks a server
with every method and budget, `scoring` marks the answers and says how sure a score is, and `rows` makes rows of them.
`public` and `lmms_eval` run the paper's public benchmarks (`published`), by lmms-eval in a virtual environment.
"""
