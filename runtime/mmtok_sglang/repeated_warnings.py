"""Warnings that may come once a request: a few lines a minute, with a count of those that were left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

__all__ = ["RepeatedWarning"]


class RepeatedWarning:
    """Logs at most `num_lines` warnings in `interval_s`; the first line after that says how many were left out.

    A server under a fault that every request meets would otherwise fill the log's disk. Make one for each kind of
    warning, so that a frequent kind does not hide another one.

    Args:
        logger: What logs.
        num_lines: Lines in an interval.
        interval_s: Seconds, from an interval's first warning on.
        now_s: The time, for tests.
    """

    def __init__(
        self,
        logger: logging.Logger,
        num_lines: int = 5,
        interval_s: float = 60.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._num_lines = num_lines
        self._interval_s = interval_s
        self._now_s = now_s
        self._interval_end_s = float("-inf")
        self._lines_left = 0
        self._num_left_out = 0

    def log(self, message: str, *values: object, error: BaseException | None = None) -> None:
        """Logs `message % values`, with the traceback of an error, or counts it as left out."""
        now_s = self._now_s()
        if now_s >= self._interval_end_s:
            self._interval_end_s = now_s + self._interval_s
            self._lines_left = self._num_lines
        if not self._lines_left:
            self._num_left_out += 1
            return
        self._lines_left -= 1
        if self._num_left_out:
            message += " (%d such warnings before this one were left out)"
            values = (*values, self._num_left_out)
            self._num_left_out = 0
        self._logger.warning(message, *values, exc_info=error, stacklevel=2)
