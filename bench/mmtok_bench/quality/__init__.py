"""`mmtok quality`: scores of a served model by task, method and budget.

`bench` runs it. For the pocket tasks, `plan` has the settings and the file of answers, `sweep` asks a server with
every method and budget, `scoring` computes scores with their intervals, and `rows` makes result rows. `public` and
`lmms_eval` run the paper's public benchmarks (`published`) with lmms-eval in a virtual environment of its own.
"""
