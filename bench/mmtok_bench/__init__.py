"""Benchmarks, quality, the demonstration and fault injection, on one harness.

`commands` is their command line. `run` keeps a run's rows (`results`), progress, resume, JSON and exit code; `server`
starts SGLang servers and `server_metrics` reads what they count; `client` asks them; `report` renders rows as tables,
plots and one page. On these: `selector`, `serve`, `quality`, `demo` and `soak`.

What they serve and ask: `tiny_checkpoints` (random weights), `dummy_models` (no weights), `pocket` (trained models and
their tasks), `photographs`.
"""
