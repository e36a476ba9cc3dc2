"""`mmtok bench serve`: what a served model gains from a budget, at which load, and where it gains nothing.

`presets` has the models, sizes and budgets. From them `plan` makes the servers, the cases to measure and their order.
`bench` starts the servers and runs the plan. `measure` compares the server at budget `all` with the one without the
plugin, runs each case by a public load generator (`load`, in a process of `load_process`), and makes a row of the
results (`rows`).
"""
