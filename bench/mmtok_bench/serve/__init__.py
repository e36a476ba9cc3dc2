"""`mmtok bench serve`: what a served model gains from a budget, at which load, and where it gains nothing.

From `presets` (which models, sizes, budgets) `plan` makes the servers, the cases to measure and their order; `bench`
starts the servers and runs it; `measure` holds the server at budget `all` against the one without the plugin, drives
each case by a public load generator (`load`, which `load_process` runs), and makes a row of what that and the server
counted (`rows`).
"""
