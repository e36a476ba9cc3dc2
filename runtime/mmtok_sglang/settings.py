"""What a server was started with, resolved against its model family's preset."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mmtok_deploy.budget import Budget
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.executors import ExecutorName
from mmtok_deploy.guidance import GuidanceRule
from mmtok_deploy.methods import MethodName, check_method, coverage_of
from mmtok_sglang.agent_address import AgentAddress
from mmtok_sglang.limits import Limits

__all__ = ["DEFAULT_AGENT_MODEL", "DEFAULT_AGENT_TIMEOUT_MS", "DEFAULT_FEATURE_CACHE_MB", "Settings"]

DEFAULT_AGENT_MODEL = "default"
DEFAULT_AGENT_TIMEOUT_MS = 1000

DEFAULT_FEATURE_CACHE_MB = 256
"""43 images of LLaVA-1.5 7B, 15 of a megapixel on Qwen2.5-VL 7B: those of the conversations at hand."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One server's selection settings; every process of the server holds the same.

    Args:
        family: Key of `mmtok_deploy.presets.PRESETS`, and of `families.FAMILIES`.
        budget: Tokens an image keeps where the request names no budget of its own.
        config: Temperatures, weight, coverage.
        guidance: How guidance words are taken from a question.
        backend: What runs the selection.
        engine: The exported file that does, if one does.
        provider: ONNX Runtime's, instead of the device's own.
        engine_sha256: What the exported file must hash to, lower case; None takes any that its manifest describes.
        feature_cache_mb: MiB of vision features kept by image in each scheduler process; 0 keeps none.
        min_tokens_in: An image that takes fewer tokens in an unpruned prompt is not pruned.
        method: What chooses the tokens where the request names no method of its own.
        seed: Of the method that draws.
        agent_url: Of the OpenAI-compatible endpoint that answers first, up to its `/v1`, with its credentials, which
            are never shown; None asks none.
        agent_model: The agent's name there.
        agent_timeout_ms: After which the question alone guides.
        limits: What a request is refused for.
        trust_image_hashes: A caller's own names of images (`mm_hashes`, `content_hash`) are taken for their pixels.

    Raises:
        ValueError: An unknown guidance rule or method, a backend without the file that it runs or the other way
            round, a method that the backend does not run, or a negative number.
    """

    family: str
    budget: Budget
    config: SelectionConfig
    guidance: GuidanceRule
    backend: ExecutorName = "auto"
    engine: Path | None = None
    provider: str | None = None
    engine_sha256: str | None = None
    feature_cache_mb: int = DEFAULT_FEATURE_CACHE_MB
    min_tokens_in: int = 0
    method: MethodName = "mmtok"
    seed: int = 0
    agent_url: str | None = field(default=None, repr=False)
    agent_model: str = DEFAULT_AGENT_MODEL
    agent_timeout_ms: int = DEFAULT_AGENT_TIMEOUT_MS
    limits: Limits = field(default_factory=Limits)
    trust_image_hashes: bool = False

    def __post_init__(self) -> None:
        if self.guidance not in get_args(GuidanceRule):
            raise ValueError(f"guidance is one of {', '.join(get_args(GuidanceRule))}, got {self.guidance!r}")
        if self.backend in ("onnxruntime", "tensorrt") and self.engine is None:
            raise ValueError(f"--mmtok-backend {self.backend} runs an exported file: add --mmtok-engine FILE")
        if self.backend in ("torch", "triton") and self.engine is not None:
            raise ValueError(
                f"--mmtok-backend {self.backend} runs no exported file: drop --mmtok-engine, or the backend"
            )
        if self.provider is not None and self.engine is None:
            raise ValueError("--mmtok-onnxruntime-provider is for an exported file: add --mmtok-engine FILE.onnx")
        if self.engine_sha256 is not None:
            if self.engine is None:
                raise ValueError("--mmtok-engine-sha256 is for an exported file: add --mmtok-engine FILE")
            if not re.fullmatch("[0-9a-f]{64}", self.engine_sha256):
                raise ValueError(f"engine_sha256 is 64 hexadecimal digits (sha256sum), got {self.engine_sha256!r:.100}")
        if self.feature_cache_mb < 0:
            raise ValueError(f"feature_cache_mb is at least 0, got {self.feature_cache_mb}")
        if self.min_tokens_in < 0:
            raise ValueError(f"min_tokens_in is at least 0, got {self.min_tokens_in}")
        if self.seed < 0:
            raise ValueError(f"seed is at least 0, got {self.seed}")
        self.check_method(self.method)
        self._check_agent()

    def check_method(self, method: object) -> MethodName:
        """Returns the method if this server's backend runs it.

        Raises:
            ValueError: It does not, there is none of that name, or it contradicts the server's coverage.
        """
        name = check_method(method)
        if name != "mmtok" and (self.engine is not None or self.backend not in ("auto", "torch")):
            runs = self.backend if self.engine is None else self.engine.name
            raise ValueError(
                f"{runs} runs the method mmtok alone, not {name}: start the server with --mmtok-backend torch"
            )
        covers = coverage_of(name, self.config)
        if name != "mmtok" and covers not in (None, self.config.coverage) and self.config.coverage != "multimodal":
            raise ValueError(f"{name} contradicts --mmtok-coverage {self.config.coverage}: drop one of the two")
        return name

    def _check_agent(self) -> None:
        if self.agent_timeout_ms <= 0:
            raise ValueError(f"agent_timeout_ms is above 0, got {self.agent_timeout_ms}")
        if self.agent_url is None:
            return
        AgentAddress(self.agent_url)
        if self.engine is not None:
            raise ValueError(
                "--mmtok-agent-url makes guidance longer than an exported file may take: drop it, or --mmtok-engine"
            )

    def flags(self) -> dict[str, Any]:
        """Returns the settings as the values of the --mmtok-* flags, for `/server_info`."""
        return {
            "mmtok_budget": str(self.budget),
            "mmtok_min_tokens": self.budget.minimum,
            "mmtok_min_tokens_in": self.min_tokens_in,
            "mmtok_tv_temp": self.config.tv_temp,
            "mmtok_vv_temp": self.config.vv_temp,
            "mmtok_alpha": self.config.alpha,
            "mmtok_coverage": self.config.coverage,
            "mmtok_guidance": self.guidance,
            "mmtok_method": self.method,
            "mmtok_seed": self.seed,
            "mmtok_agent_url": None if self.agent_url is None else AgentAddress(self.agent_url).shown,
            "mmtok_agent_model": self.agent_model,
            "mmtok_agent_timeout_ms": self.agent_timeout_ms,
            "mmtok_backend": self.backend,
            "mmtok_engine": None if self.engine is None else str(self.engine),
            "mmtok_engine_sha256": self.engine_sha256,
            "mmtok_onnxruntime_provider": self.provider,
            "mmtok_feature_cache_mb": self.feature_cache_mb,
            "mmtok_max_image_pixels": self.limits.max_image_pixels,
            "mmtok_max_aspect_ratio": self.limits.max_aspect_ratio,
            "mmtok_max_guidance_tokens": self.limits.max_guidance_tokens,
            "mmtok_max_selection_cost": self.limits.max_selection_cost,
            "mmtok_trust_image_hashes": self.trust_image_hashes,
        }
