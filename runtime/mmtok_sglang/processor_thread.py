"""A processor's work in a thread of its own: on the event loop, every other request would wait for it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["ProcessorThread"]


class ProcessorThread:
    """Runs the calls of one processor, one after another, on a copy: two threads cannot use one tokenizer at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mmtok-processor")
        self._copy: Any = None

    async def run(self, call: Callable[..., Awaitable[Any]], processor: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what `call` returns for the copy of the processor and the other arguments.

        Args:
            call: Awaited in the thread, by an event loop of its own.
            processor: SGLang's, with the Hugging Face processor or tokenizer in `_processor`.
            *args: Arguments behind the processor.
            **kwargs: Arguments by name.
        """

        async def called() -> Any:
            return await call(self._copy, *args, **kwargs)

        def run() -> Any:
            if self._copy is None:
                self._copy = _copy_of(processor)
            return asyncio.run(called())

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)


def _copy_of(processor: Any) -> Any:
    copied = copy.copy(processor)
    copied._processor = copy.deepcopy(processor._processor)
    for name in {"tokenizer", "_tokenizer"} & vars(processor).keys():
        setattr(copied, name, getattr(copied._processor, "tokenizer", copied._processor))
    return copied
