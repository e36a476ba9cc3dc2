"""mmtok bench serve: what a served model gains from a budget, at which load, and where it gains nothing.

From `presets` (which models, sizes, budgets) `plan` makes the servers, the cells to measure and their order; `measure`
starts the servers, holds the one at budget `all` against the one without the plugin (`answers`), and drives every cell
by a public load generator (`load`); `rows` joins that with what the server counted (`server_counts`); `table` and
`breakeven` say it in print.
"""
