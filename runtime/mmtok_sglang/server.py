"""What one process of a server with a budget holds, one of each."""

from __future__ import annotations

from typing import Any

from mmtok_sglang.cache_key import CacheKeys, naming
from mmtok_sglang.failures import Failures
from mmtok_sglang.feature_cache import FeatureCache
from mmtok_sglang.invalidation import Invalidation
from mmtok_sglang.metrics import SelectionMetrics
from mmtok_sglang.placeholders import PlaceholderCutter
from mmtok_sglang.positions import PositionWriter
from mmtok_sglang.repeated_patches import dropping_repeated_pixels
from mmtok_sglang.selection import TokenSelector
from mmtok_sglang.settings import Settings
from mmtok_sglang.stages import StageMetrics

__all__ = ["Server", "current", "start"]


class Server:
    """A process's share of a server: the tokenizer process uses `cutter` and `process`, the scheduler the rest.

    Args:
        settings: The server's, the same in every process.
        family: The model's family.
    """

    def __init__(self, settings: Settings, family: Any) -> None:
        self.settings = settings
        self.family = family
        self.metrics = SelectionMetrics()
        self.cutter = PlaceholderCutter(settings, family)
        self.process = dropping_repeated_pixels(naming(self.cutter.process_mm_data, settings))
        self.keys = CacheKeys(settings)
        self.cache = FeatureCache(settings.feature_cache_mb << 20, self.metrics)
        self.selector = TokenSelector(settings, self.metrics, family.expected_features)
        self.failures = Failures()
        self.positions = PositionWriter(self.selector, self.failures)
        self.stages = StageMetrics()
        self.invalidation = Invalidation(self.keys, self.cache, self.selector)


_servers: list[Server] = []


def start(settings: Settings, family: Any) -> Server:
    """Returns this process's share of a server, which `current` returns from now on."""
    _servers[:] = [Server(settings, family)]
    return _servers[0]


def current() -> Server:
    """Returns this process's share of the server.

    Raises:
        RuntimeError: The process is part of no server with a budget.
    """
    if not _servers:
        raise RuntimeError("MMTok: a model or processor of the plugin's is made in a server without --mmtok-budget")
    return _servers[0]
