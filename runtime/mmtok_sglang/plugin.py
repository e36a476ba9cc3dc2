"""SGLang's two entry points into this package; imports nothing of SGLang until one of them is called."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version

import torch

from mmtok_deploy.environment import sglang_platform, use_cpu_engine

__all__ = ["SUPPORTED_SGLANG", "activate_cpu_platform", "register"]

logger = logging.getLogger(__name__)

SUPPORTED_SGLANG = "0.5.23"
"""The one version whose hook points were checked by running them."""


def register() -> None:
    """Adds the --mmtok-* flags to SGLang; nothing else changes unless a server is started with --mmtok-budget.

    Raises:
        SystemExit: With exit code 2: another version of SGLang, and a --mmtok flag on the command line. (SGLang
            swallows a plugin's exceptions and would serve unpruned.)

    Source: entry point group `sglang.srt.plugins`, sglang 0.5.23 srt/plugins/__init__.py.
    """
    found = version("sglang")
    if found != SUPPORTED_SGLANG:
        message = (
            f"mmtok-deploy supports sglang {SUPPORTED_SGLANG}, found {found}: "
            f"pip install 'sglang=={SUPPORTED_SGLANG}', or start the server without --mmtok flags"
        )
        if any(argument.startswith("--mmtok") for argument in sys.argv):
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(2)
        logger.warning("%s. The plugin is inactive.", message)
        return

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from mmtok_sglang.server_args import MMTokServerArgs

    HookRegistry.register("sglang.srt.server_args.ServerArgs", MMTokServerArgs, HookType.REPLACE)
    # The engine binds the class when it is imported, which `sgl.Engine` does before it loads plugins.
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None:
        engine.Engine.server_args_class = MMTokServerArgs


def activate_cpu_platform() -> str | None:
    """Returns the path of the CPU platform's class where it is wanted, None elsewhere.

    It is wanted where PyTorch finds no accelerator, and where SGLANG_PLATFORM=torch_cpu asks for it. SGLang's own CPU
    engine (SGLANG_USE_CPU_ENGINE=1, a build with compiled CPU kernels) takes precedence.

    Source: entry point group `sglang.srt.platforms`, sglang 0.5.23 srt/platforms/__init__.py.
    """
    asked_for = sglang_platform() == "torch_cpu"
    if asked_for or not (torch.accelerator.is_available() or use_cpu_engine()):
        return "mmtok_sglang.cpu_platform:TorchCpuPlatform"
    return None
