"""What needs an NVIDIA GPU, with a command each: `make gpu-check` and `make paper`. It is in no wheel.

`parts` has the checks and their `bars`, and `runs` runs them; `served_checks` and `graph_times` measure what no other
command does. `paper` runs the paper's measurements with real weights.
"""
