"""The --mmtok-* flags, as fields of SGLang's ServerArgs."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any, Optional

import msgspec
import sglang.srt.server_args
from sglang.srt.arg_groups.arg_utils import NS, A, Arg
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.environ import envs
from sglang.srt.utils import is_cuda

from mmtok_deploy.auto_budget import AutoBudget, parse_budget, parse_share
from mmtok_deploy.presets import PRESETS
from mmtok_sglang.agent_address import AgentAddress
from mmtok_sglang.flush_count import make_flush_count
from mmtok_sglang.limits import Limits, default_limits
from mmtok_sglang.prefill_graphs import log_prefill_graphs, prefer_prefill_graphs
from mmtok_sglang.settings import FLAGS, Settings
from mmtok_sglang.start_errors import (
    FlagError,
    end_start,
    ends_start,
    naming_flags,
    warn_of_environment,
    without_usage,
)

__all__ = ["MMTokServerArgs"]

logger = logging.getLogger(__name__)

# SGLang's own: its module's ServerArgs becomes the class below.
_add_cli_args = sglang.srt.server_args.ServerArgs.add_cli_args

_WithFlags: Any = msgspec.defstruct(
    "_WithFlags",
    [(f"mmtok_{each.name}", A[Optional[each.type], Arg(help=each.help), NS("mm")], None) for each in FLAGS],  # noqa: UP045
    bases=(sglang.srt.server_args.ServerArgs,),
    module=__name__,
    dict=True,
)


class MMTokServerArgs(_WithFlags, dict=True):  # type: ignore[call-arg]
    """SGLang's ServerArgs with the flags of the selection; they reach every process of a server by pickling.

    A process in which arguments with a budget are resolved installs the plugin, all of it or nothing, and every process
    of a server resolves them before it does anything else: none of a pruning server can run without it, and none of
    another server is touched. (sglang 0.5.23 srt/runtime_context.py `publish`, which `TokenizerManager` insists on and
    `run_scheduler_process` begins with, calls `resolve_once`.)

    Replaces: sglang 0.5.23 srt/server_args.py ServerArgs. Can go when SGLang lets plugins declare flags.
    """

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Adds the flags, SGLang's included."""
        _add_cli_args(parser)
        without_usage(parser)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> MMTokServerArgs:
        """Returns the arguments of a command line; a value that cannot be served ends the process."""
        try:
            arguments: MMTokServerArgs = super().from_cli_args(args)
        except FlagError as error:
            end_start(error)
        arguments._mmtok_on_command_line = True
        return arguments

    def __post_init__(self) -> None:
        """Checks the flags as soon as they are given.

        Raises:
            FlagError: A value that is not understood, or a --mmtok flag without --mmtok-budget.
        """
        super().__post_init__()
        url: str | None = self.mmtok_agent_url  # type: ignore[has-type]
        if url is not None:
            # SGLang shows the fields in the log and in `/server_info`; beside them the address is whole.
            self._mmtok_agent_url = url
            with naming_flags(self.__struct_fields__):
                self.mmtok_agent_url = AgentAddress(url).shown
        if self.mmtok_budget is not None:
            # Any preset serves: this checks the user's values, and the family is not known yet.
            with naming_flags(self.__struct_fields__):
                self._mmtok_given = self._given()
                Settings.of(next(iter(PRESETS)), self._mmtok_given, Limits())
            return
        given = [
            name for name in self.__struct_fields__ if name.startswith("mmtok_") and getattr(self, name) is not None
        ]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise FlagError(f"{flags} has no effect without --mmtok-budget: add it, or --mmtok-budget all")

    def resolve_once(self) -> None:
        """Resolves the arguments; if there is a budget, registers the family's classes and installs the hooks.

        Raises:
            UnsupportedServerError: A model or a configuration in which a token could be pruned wrongly or not at all,
                or a method that the model cannot run.
            ArtifactError: The exported file is not whole.
            EngineMismatchError: It was exported for another model, budget or dtype.
            HookError: A hook point of SGLang is missing or has changed, or the process has hooks of other settings.
        """
        if self.mmtok_budget is not None and self.model_impl == "transformers":
            # What a LLaVA needs without the plugin. Left as it is, SGLang would pass over the family's own class.
            declare_resolution(self, "mmtok", model_impl="auto")
        if self.mmtok_budget is not None and self.mm_feature_transport is None and not _asks_for_cuda_ipc():
            # For Qwen3-VL on an H100 or H200 SGLang would choose CUDA IPC, which is refused. 8-bit pixels are an eighth
            # of what it saves copying.
            declare_resolution(self, "mmtok", mm_feature_transport="cpu")
        has_own_graphs = self.mmtok_budget is not None and prefer_prefill_graphs(self)
        with ends_start(self.__dict__.get("_mmtok_on_command_line", False)):
            if self.mmtok_budget is not None:
                from mmtok_sglang.compatibility import check_unread_config

                _check_model_path(self.model_path)
                check_unread_config(self.model_path)
        super().resolve_once()
        if _in_detokenizer():
            return
        if self.mmtok_budget is not None and multiprocessing.parent_process() is None:
            if has_own_graphs:
                log_prefill_graphs(self)
            if is_cuda() and self.tokenizer_worker_num == 1:
                _advise_tokenizers()
        with ends_start(self.__dict__.get("_mmtok_on_command_line", False)):
            self._resolve()

    def _resolve(self) -> None:
        warn_of_environment(self.__struct_fields__)
        if self.mmtok_budget is None:
            _install(None)
            return
        from mmtok_sglang.compatibility import (
            check_adapters,
            check_agent,
            check_backend,
            check_embedding,
            check_engine,
            check_model_impl,
            check_scale,
            check_server,
            check_server_method,
            check_sharing,
            check_skipping,
            check_speculation,
            check_stages,
            family_of_server,
        )
        from mmtok_sglang.families import FAMILIES

        name = family_of_server(self)
        limits = default_limits(self.device, FAMILIES[name].max_pixels_on_cpu)
        if self.mmtok_agent_url is not None and "_mmtok_flush_count" not in self.__dict__:
            # By the first process, from which all others get it with the arguments.
            self._mmtok_flush_count = make_flush_count()
        settings = Settings.of(name, self._mmtok_given, limits)
        self._mmtok_settings = replace(settings, flush_count=self.__dict__.get("_mmtok_flush_count"))
        check_model_impl(self, self._mmtok_settings)
        check_server(self)
        check_adapters(self, self._mmtok_settings)
        check_embedding(self, self._mmtok_settings)
        check_server_method(self, self._mmtok_settings)
        check_scale(self._mmtok_settings)
        check_sharing(self._mmtok_settings)
        check_skipping(self._mmtok_settings)
        check_speculation(self, self._mmtok_settings)
        check_stages(self, self._mmtok_settings)
        check_agent(self, self._mmtok_settings)
        check_backend(self, self._mmtok_settings)
        check_engine(self, self._mmtok_settings)
        _install(self._mmtok_settings)

    @property
    def launch_command(self) -> str | None:
        """The command line or the call of `sgl.Engine`, as SGLang shows it, without credentials of the agent."""
        command: str | None = super().launch_command
        url = self.__dict__.get("_mmtok_agent_url")
        if command is None or url is None:
            return command
        address = AgentAddress(url)
        return address.hide(command.replace(url, address.shown))

    def resolved_dict(self) -> dict[str, Any]:
        """Returns the resolved values, those of the selection included, for `/server_info`."""
        resolved: dict[str, Any] = super().resolved_dict()
        settings = self.__dict__.get("_mmtok_settings")
        return resolved | settings.flags() if settings else resolved

    def _given(self) -> dict[str, Any]:
        """Returns the flags that are given, by name; the budgets parsed, and the agent's address whole."""
        values = {each.name: getattr(self, f"mmtok_{each.name}") for each in FLAGS}
        given = {name: value for name, value in values.items() if value is not None}
        auto_min, auto_max = (_share(name, given.get(name)) for name in ("auto_min", "auto_max"))
        given["auto"] = AutoBudget(auto_min=auto_min, auto_max=auto_max)
        given["budget"] = parse_budget(self.mmtok_budget, given["auto"], minimum=given.get("min_tokens", 1))
        if "agent_url" in given:
            given["agent_url"] = self._mmtok_agent_url
        return given


def _share(name: str, value: str | None) -> Fraction | None:
    try:
        return None if value is None else parse_share(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _check_model_path(path: str) -> None:
    """Refuses a folder that does not exist, for which SGLang prints 40 lines of traceback.

    Raises:
        FlagError: The path names nothing, and a model hub could not have it either.
    """
    is_hub_name = "://" in path or (path.count("/") <= 1 and not path.startswith(("/", ".", "~")))
    if not is_hub_name and not os.path.exists(path):
        raise FlagError(f"--model-path {path}: there is no such folder")


def _asks_for_cuda_ipc() -> bool:
    """True where the user asks for it by the environment, as older versions of SGLang had it."""
    setting = envs.SGLANG_USE_CUDA_IPC_TRANSPORT
    return bool(setting.is_set() and setting.get())


def _in_detokenizer() -> bool:
    # It handles no images: importing processors and models for the hooks would only cost it seconds at start. Known by
    # what the process was started to run; whatever else it is, the hooks are installed.
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    return getattr(multiprocessing.current_process(), "_target", None) is run_detokenizer_process


@cache
def _advise_tokenizers() -> None:
    """Says, once a process, that a GPU may wait for the one process that prepares images."""
    logger.info(
        "MMTok: one process prepares the images of all requests, and a GPU may wait for it: --tokenizer-worker-num 4 "
        "answered 1.6 times as many requests of 16 clients (Qwen2.5-VL-7B at 10% on an H200)"
    )


_served: list[Settings | None] = []
"""The settings of the one server that this process may be part of, None for one without a budget; empty before."""


def _install(settings: Settings | None) -> None:
    """Installs the hooks of a server with these settings in this process; None is a server without a budget.

    Raises:
        HookError: The process is or was part of another server (two `sgl.Engine`, at once or after one another): the
            hooks of one would cut the placeholders of both, and the scheduler of the other would not know. Or an
            earlier attempt left the process half hooked.
    """
    from mmtok_sglang.install import HookError, install, refuse_half_hooked

    refuse_half_hooked()
    if _served and _served[0] != settings:
        raise HookError(
            "this process has run a server with other MMTok settings, and hooks stay: start each server in a process "
            "of its own"
        )
    if settings is not None and not _served:
        from mmtok_sglang.families import FAMILIES
        from mmtok_sglang.hooks import hooks_of
        from mmtok_sglang.server import start

        family = FAMILIES[settings.family].configured(settings)
        install(hooks_of(start(settings, family)), family.model_class, family.processor_class)
        _leave_sigquit_to_sglang()
    _served[:] = [settings]


def _leave_sigquit_to_sglang() -> None:
    """Has a server with several tokenizer workers end when its scheduler does, as one with a single worker does.

    When a scheduler fails, the main process gets SIGQUIT, and SGLang's handler ends the server. With several workers,
    uvicorn's supervisor takes the signal over and drops it: /ready stays 200, and requests wait forever. Until SGLang
    keeps its handler (sgl-project/sglang pull request 39204).
    """
    from uvicorn.supervisors import multiprocess

    multiprocess.SIGNALS.pop(signal.SIGQUIT, None)
