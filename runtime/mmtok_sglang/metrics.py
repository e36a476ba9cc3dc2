"""What the selection did: SGLang's Prometheus metrics, and a line in the log once a minute."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from mmtok_sglang.ranks import is_first_rank
from mmtok_sglang.repeated_warnings import RepeatedWarning

__all__ = [
    "NOT_FINITE",
    "Clock",
    "SelectionMetrics",
    "collectors",
    "count_triton_compiles",
    "never_raises",
    "start_clock",
]

logger = logging.getLogger(__name__)

_COUNTERS = {
    "selections": "Images (LLaVA-NeXT: tiles) that tokens were selected from.",
    "selection_tokens_in": "Vision tokens that were selected from.",
    "selection_tokens_kept": "Vision tokens that were kept of them.",
    "selection_fallbacks": "Images that kept evenly spaced tokens for want of a selection.",
    "encoded_images": "Images to be pruned that went through the vision encoder.",
    "feature_cache_hits": "Images whose features were held.",
    "feature_cache_misses": "Images whose features were not held.",
    "smaller_images": "Images that were made smaller before the processor, by an encoder scale or by downsample.",
    "skipped_tokens": "Vision tokens that were not encoded, since they repeat a neighbour (--mmtok-skip-repeats).",
    "agent_timeouts": "Questions that the agent did not answer in time.",
    "agent_errors": "Questions that the agent could not be asked.",
    "agent_skips": "Questions that the agent was not asked, since it had failed several times.",
    "vision_encoder_images": "Images that went through the vision encoder, pruned or not.",
    "vision_encoder_replays": "Images whose encoder blocks were replayed as a CUDA graph.",
    "language_prefill_requests": "Requests in language model prefills; each chunk of a prompt counts.",
    "language_prefill_tokens": "Tokens that the language model prefilled.",
}
_HISTOGRAMS = {
    "image_decode_milliseconds": "Time of reading the bytes of an image, and again of decoding them.",
    "image_preprocess_milliseconds": "Time of the Hugging Face processor, for all images of a request and its text.",
    "image_hash_milliseconds": "Time of the digests of a request's images.",
    "image_transport_milliseconds": "Time of copying a request's pixels, pickling it and handing it to the scheduler.",
    "selection_milliseconds": "Time of one selection call, which takes all images of a prefill batch.",
    "agent_milliseconds": "Time that a request waited for an answer of the agent, or for the time limit.",
    "vision_encoder_milliseconds": "Time of one call of the vision encoder and its projector, pruned or not.",
    "language_prefill_milliseconds": "Time of one prefill batch in the language model, without encoder and selection.",
}
_SHARES = {
    "coverage": "Share of what all tokens of an image (LLaVA-NeXT: tile) cover that the kept ones cover.",
    "coverage_bound": "Upper bound of that share for any set of as many tokens.",
}
_GAUGES = {
    "feature_cache_bytes": "Bytes of features held, as the device's allocator counts them.",
    "selections_remembered": "Selections held, of images and of tiles.",
    "selections_remembered_bytes": "Bytes of selections held, on device and host together.",
    "reserved_bytes": "Bytes of device memory that were kept from SGLang's KV cache for features and selections.",
}
_LOG_INTERVAL_S = 60.0
NOT_FINITE = "its features are not finite"
"""Why an image kept evenly spaced tokens, where the device found out."""


_broken = RepeatedWarning(logger)


def never_raises(measure: Callable[..., None]) -> Callable[..., None]:
    """Returns the method with its errors logged: no request is lost for want of a number (a full disk, say)."""

    @wraps(measure)
    def measured(*args: Any, **kwargs: Any) -> None:
        try:
            measure(*args, **kwargs)
        except Exception as error:
            _broken.log("MMTok: metrics are missing (%s: %s)", type(error).__name__, error)

    return measured


class Clock(Protocol):
    """Measures from its making to `stop`, which does not wait for a device."""

    def stop(self) -> None: ...  # noqa: D102

    def is_done(self) -> bool:
        """True once the time is known, and with it whatever was computed before `stop`."""

    def elapsed_ms(self) -> float: ...  # noqa: D102


def start_clock(device: torch.device) -> Clock:
    """Returns a running clock for work on `device`."""
    return _CudaClock() if device.type == "cuda" else _HostClock()


@dataclass(frozen=True, slots=True)
class _Call:
    """A selection call that the device may still be at: (N, K) and, on the host, a flag [] bool, for each image.

    `tell` is called with the flags once they are there.
    """

    clock: Clock
    sizes: Sequence[tuple[int, int]]
    is_finite: Tensor
    tell: Callable[[Sequence[bool]], None]


class SelectionMetrics:
    """Counts selections and encodings; one a scheduler process. The first rank alone reports, for all.

    On an accelerator a call is counted when the device is done with it, which is looked up at the next image: nothing
    here waits.
    """

    def __init__(self) -> None:
        self.num_fallbacks = 0
        self._fallback_warning = RepeatedWarning(logger)
        self._calls: deque[_Call] = deque()
        self._lately: Counter[str] = Counter()
        self._lately_ms: list[float] = []
        self._held_bytes = 0
        self._next_line_s = 0.0

    @never_raises
    def count_call(
        self,
        clock: Clock,
        sizes: Sequence[tuple[int, int]],
        is_finite: Tensor,
        tell: Callable[[Sequence[bool]], None] = lambda _: None,
    ) -> None:
        """Counts one selection call, now or when it is done, and stops its clock.

        Args:
            clock: Started before the call.
            sizes: (tokens, kept tokens) of each image.
            is_finite: [B] bool on the device; an image where it is not True kept evenly spaced tokens.
            tell: Called with the flags once the device is done with the call.
        """
        # Into pinned memory, read after the clock: without a clock on the device the copy has to be waited for.
        on_host = is_finite.to("cpu", non_blocking=is_finite.is_cuda)
        clock.stop()
        self._calls.append(_Call(clock, sizes, on_host, tell))
        self.settle()

    @never_raises
    def count_fallback(self, num_tokens: int, num_kept: int, why: str) -> None:
        """Counts and logs an image that kept evenly spaced tokens."""
        self.num_fallbacks += 1
        self._count("selection_fallbacks", 1)
        self._fallback_warning.log(
            "MMTok: no selection for an image of %d tokens (%s); %d evenly spaced tokens instead, the %d. time since "
            "the start",
            num_tokens,
            why,
            num_kept,
            self.num_fallbacks,
        )

    @never_raises
    def count_coverage(self, family: str, method: str, coverage: float, bound: float) -> None:
        """Counts what one selection covers.

        Args:
            family: The model's, as `families.FAMILIES` has it.
            method: What selected.
            coverage: `Outcome.coverage`.
            bound: `Outcome.coverage_bound`.
        """
        if is_first_rank():
            collectors()["coverage"].labels(family, method).observe(coverage)
            collectors()["coverage_bound"].labels(family, method).observe(bound)

    @never_raises
    def count_encoding(self, *, num_encoded: int, num_hits: int, num_misses: int, held_bytes: int) -> None:
        """Counts the images of a batch by where their features came from; `held_bytes` is the cache's size after it."""
        self._count("encoded_images", num_encoded)
        self._count("feature_cache_hits", num_hits)
        self._count("feature_cache_misses", num_misses)
        self._held_bytes = held_bytes
        if is_first_rank():
            collectors()["feature_cache_bytes"].set(held_bytes)
        self.settle()

    def set_remembered(self, num_selections: int, size_bytes: int) -> None:
        """Sets the gauges of the selections that are held."""
        if is_first_rank():
            collectors()["selections_remembered"].set(num_selections)
            collectors()["selections_remembered_bytes"].set(size_bytes)

    def set_reserved(self, size_bytes: int) -> None:
        """Sets the gauge of the memory that SGLang's KV cache leaves to the plugin."""
        if is_first_rank():
            collectors()["reserved_bytes"].set(size_bytes)

    def settle(self) -> None:
        """Counts the calls that the device is done with; waits for none."""
        while self._calls and self._calls[0].clock.is_done():
            self._count_done(self._calls.popleft())
            if time.monotonic() >= self._next_line_s:
                self._next_line_s = time.monotonic() + _LOG_INTERVAL_S
                self._log_line()

    def _count_done(self, call: _Call) -> None:
        self._count("selections", len(call.sizes))
        self._count("selection_tokens_in", sum(num_tokens for num_tokens, _ in call.sizes))
        self._count("selection_tokens_kept", sum(num_kept for _, num_kept in call.sizes))
        self._lately_ms.append(call.clock.elapsed_ms())
        if is_first_rank():
            collectors()["selection_milliseconds"].observe(self._lately_ms[-1])
        flags = call.is_finite.tolist()
        for (num_tokens, num_kept), is_finite in zip(call.sizes, flags, strict=True):
            if not is_finite:
                self.count_fallback(num_tokens, num_kept, NOT_FINITE)
        call.tell(flags)

    def _log_line(self) -> None:
        lately, num_calls = self._lately, len(self._lately_ms)
        if is_first_rank():
            logger.info(
                "MMTok: %d selections in %d calls of %.1f ms, %d -> %d tokens, %d fallbacks; %d images encoded; "
                "feature cache: %d hits, %d misses, %.1f MB",
                *(lately["selections"], num_calls, sum(self._lately_ms) / num_calls),
                *(lately["selection_tokens_in"], lately["selection_tokens_kept"], lately["selection_fallbacks"]),
                *(lately["encoded_images"], lately["feature_cache_hits"], lately["feature_cache_misses"]),
                self._held_bytes / 2**20,
            )
        lately.clear()
        self._lately_ms.clear()

    def _count(self, name: str, amount: int) -> None:
        self._lately[name] += amount
        if amount and is_first_rank():
            collectors()[name].inc(amount)


class _HostClock:
    def __init__(self) -> None:
        self._start_s = self._stop_s = time.perf_counter()

    def stop(self) -> None:
        self._stop_s = time.perf_counter()

    def is_done(self) -> bool:
        return True

    def elapsed_ms(self) -> float:
        return (self._stop_s - self._start_s) * 1000


class _CudaClock:
    def __init__(self) -> None:
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._start.record()

    def stop(self) -> None:
        self._stop.record()

    def is_done(self) -> bool:
        return bool(self._stop.query())

    def elapsed_ms(self) -> float:
        return float(self._start.elapsed_time(self._stop))


def collectors() -> dict[str, Any]:
    """Returns this process's Prometheus collectors by name, without the `mmtok:` before it; from any thread."""
    # `cache` lets two threads make them at once, and Prometheus takes each name once.
    with _making_collectors:
        return _make_collectors()


def count_triton_compiles() -> None:
    """Counts from now on what Triton compiles in this process, or loads from its cache: requests wait for either.

    The counters are made here and not with the others: a server that does not count says nothing, not 0.
    """
    from prometheus_client import Counter

    from mmtok_deploy.backends.triton_launch import tell_of_compiles

    ours = Counter("mmtok:triton_compiles", "Kernels of MMTok that Triton compiled after the start.")
    others = Counter("mmtok:triton_compiles_elsewhere", "Other kernels that Triton compiled in the scheduler process.")
    tell_of_compiles(lambda is_ours: (ours if is_ours else others).inc())


_making_collectors = threading.Lock()


@cache
def _make_collectors() -> dict[str, Any]:
    # Imported here: prometheus_client looks for SGLang's multi-process folder when it is first imported, and that
    # folder is set between the moment the hooks are installed and the start of the schedulers.
    from prometheus_client import Counter, Gauge, Histogram

    made: dict[str, Any] = {name: Counter(f"mmtok:{name}", text) for name, text in _COUNTERS.items()}
    buckets = [step * 10.0**power for power in range(-1, 5) for step in (1, 2, 5)]
    made |= {name: Histogram(f"mmtok:{name}", text, buckets=buckets) for name, text in _HISTOGRAMS.items()}
    shares = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
    labels = ["family", "method"]
    made |= {name: Histogram(f"mmtok:{name}", text, labels, buckets=shares) for name, text in _SHARES.items()}
    made |= {name: Gauge(f"mmtok:{name}", text, multiprocess_mode="sum") for name, text in _GAUGES.items()}
    made["refused_requests"] = Counter("mmtok:refused_requests", "Requests that were refused, by kind.", ["kind"])
    return made
