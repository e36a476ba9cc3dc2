"""Benchmarks, quality, the demonstration and fault injection, on one harness.

`commands` is the command line. `run` handles rows (`results`), progress, resume, JSON and exit code of a run; `server`
starts SGLang servers and `server_metrics` reads their counters; `client` sends requests; `report` renders rows as
tables, plots and one page. `selector`, `serve`, `quality`, `demo` and `soak` are built on these.

Models and images: `tiny_checkpoints` (random weights), `dummy_models` (no weights), `pocket` (trained models and their
tasks), `photographs`.
"""
