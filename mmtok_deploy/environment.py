"""Every environment variable the project reads; command-line flags win over them.

NVIDIA_TF32_OVERRIDE is NVIDIA's. The others are SGLang's, and are read exactly as SGLang 0.5.23 reads them
(srt/plugins/__init__.py, srt/platforms/__init__.py): an empty value counts as unset.
"""

from __future__ import annotations

import os

__all__ = [
    "is_set",
    "sglang_platform",
    "sglang_plugins",
    "tf32_is_forbidden",
    "use_cpu_engine",
    "without_sglang_choices",
]

_PLATFORM = "SGLANG_PLATFORM"
_PLUGINS = "SGLANG_PLUGINS"
_CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"


def is_set(name: str) -> bool:
    """Returns whether a variable is set and not empty; for warnings about variables that are not read."""
    return bool(os.environ.get(name))


def sglang_platform() -> str | None:
    """Returns SGLANG_PLATFORM, the one platform plugin that SGLang may load; None if unset."""
    return os.environ.get(_PLATFORM) or None


def sglang_plugins() -> list[str] | None:
    """Returns SGLANG_PLUGINS, the only plugins and platforms that SGLang may load; None if unset.

    A value without a name in it (",") is an empty list: SGLang then loads nothing.
    """
    value = os.environ.get(_PLUGINS)
    return [name.strip() for name in value.split(",") if name.strip()] if value else None


def use_cpu_engine() -> bool:
    """Returns whether SGLANG_USE_CPU_ENGINE asks for SGLang's own CPU engine; only "1" does."""
    return os.environ.get(_CPU_ENGINE) == "1"


def tf32_is_forbidden() -> bool:
    """Returns whether NVIDIA_TF32_OVERRIDE keeps NVIDIA's libraries from computing float32 products in TF32."""
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


def without_sglang_choices() -> dict[str, str]:
    """Returns this process's environment without the three variables, for a subprocess that is free of them."""
    return {name: value for name, value in os.environ.items() if name not in (_PLATFORM, _PLUGINS, _CPU_ENGINE)}
