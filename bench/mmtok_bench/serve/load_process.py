"""Imports SGLang's load generator once, and forks a process for each load.

    python -m mmtok_bench.serve.load_process

Each line of standard input is a JSON object: the load generator's `arguments`, and `log`, the file for its output. Each
line of standard output is the exit status of a load. The process ends when its input ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Runs loads until the input ends."""
    # The imported module may print, so statuses get a file descriptor of their own.
    statuses = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    generator = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "sglang.benchmark.serving")
    # Without this, a garbage collection in a forked process would copy all pages of the imported modules.
    gc.freeze()
    for line in sys.stdin:
        load = json.loads(line)
        process_id = os.fork()
        if process_id == 0:
            _redirect(load["log"])
            sys.argv = [generator.__name__, *load["arguments"]]
            _run_and_exit(generator.cli_main)
        _, status = os.waitpid(process_id, 0)
        print(os.waitstatus_to_exitcode(status), file=statuses, flush=True)


def _redirect(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for source, target in ((nothing, sys.stdin), (output, sys.stdout), (output, sys.stderr)):
        os.dup2(source, target.fileno())


def _run_and_exit(run: Callable[[], Any]) -> None:
    """Runs the load and ends this process with Python's exit status, without the seconds of tearing down modules."""
    status = 0
    try:
        run()
    except SystemExit as end:
        if end.code is not None:
            status = end.code if isinstance(end.code, int) else 1
            print("" if isinstance(end.code, int) else end.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
