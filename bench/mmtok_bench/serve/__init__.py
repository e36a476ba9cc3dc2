"""`mmtok bench serve`: measures a served model with and without budgets, at several loads and image sizes.

`presets` has the models, sizes and budgets. From them `plan` makes the servers, the cases to measure and their order.
`bench` starts the servers and runs the plan. `measure` compares the server at budget `all` with the one without the
plugin, runs each case by a public load generator (`load`, in a process of `load_process`), and makes a row of the
results (`rows`).
"""
