"""A server's own measurements: times by stage from its metrics, and its peak memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from prometheus_client.parser import text_string_to_metric_families

from mmtok_bench.process_tree import process_tree, sum_resident_bytes
from mmtok_bench.results import STAGES
from mmtok_bench.server import SglangServer, fetch

__all__ = ["PeakMemory", "parse_counts", "read_counts", "stage_metrics"]

_SAMPLE_INTERVAL_S = 1.0
_STAGES = {name: f"mmtok:{name.removesuffix('_ms')}_milliseconds_sum" for name in STAGES}
_ENCODED = "mmtok:vision_encoder_images_total"
_FALLBACKS = "mmtok:selection_fallbacks_total"


def read_counts(server: SglangServer) -> dict[str, float]:
    """Returns the plugin's counters and sums of a server with `--enable-metrics`; none of a server without the plugin.

    Raises:
        ServerError: The server does not answer.
    """
    return parse_counts(fetch(f"{server.url}/metrics"))


def parse_counts(text: str) -> dict[str, float]:
    """Returns the plugin's counters and sums in a text of Prometheus's format, each summed over its labels."""
    counts: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("mmtok:") and not sample.name.endswith("_bucket"):
                counts[sample.name] = counts.get(sample.name, 0.0) + float(sample.value)
    return counts


def stage_metrics(before: Mapping[str, float], after: Mapping[str, float], num_requests: int) -> dict[str, float]:
    """Returns each stage's milliseconds and the encoded images per request, and the fallbacks to evenly spaced tokens.

    A number that the server does not count is absent.

    Args:
        before: `read_counts` before the requests.
        after: `read_counts` after the requests.
        num_requests: Number of requests.
    """
    counted = {name: after[name] - before.get(name, 0.0) for name in after}
    metrics = {name: counted[count] / num_requests for name, count in _STAGES.items() if count in counted}
    if _ENCODED in counted:
        metrics["images_encoded_per_request"] = counted[_ENCODED] / num_requests
    return metrics | ({"num_fallbacks": counted[_FALLBACKS]} if _FALLBACKS in counted else {})


class PeakMemory:
    """The peak memory while a `with` block runs, sampled once a second.

    On a CPU: the sum of the resident memory of the server's processes (shared pages count several times). On CUDA: all
    memory in use on the first device, by any process.

    Args:
        server_pid: PID of the server's first process.
        on_cpu: Whether the server computes on the CPU.
    """

    def __init__(self, server_pid: int, *, on_cpu: bool) -> None:
        self.peak_bytes = 0
        # Found once: searching all processes every second would take time from the server on two cores.
        self._processes = process_tree(server_pid) if on_cpu else None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            ours = self._processes
            used_bytes = int(torch.cuda.device_memory_used()) if ours is None else sum_resident_bytes(ours)
            self.peak_bytes = max(self.peak_bytes, used_bytes)
            if self._stopped.wait(_SAMPLE_INTERVAL_S):
                return
