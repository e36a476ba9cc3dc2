"""The --mmtok-* flags, as fields of SGLang's ServerArgs."""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import sglang.srt.server_args
from sglang.srt.arg_groups.arg_utils import NS, A, Arg
from sglang.srt.arg_groups.overrides import declare_resolution

from mmtok_deploy.budget import Budget
from mmtok_deploy.presets import PRESETS
from mmtok_sglang.agent_address import AgentAddress
from mmtok_sglang.limits import Limits, default_limits
from mmtok_sglang.settings import (
    DEFAULT_AGENT_MODEL,
    DEFAULT_AGENT_TIMEOUT_MS,
    DEFAULT_FEATURE_CACHE_MB,
    Settings,
)
from mmtok_sglang.start_errors import (
    FlagError,
    end_start,
    ends_start,
    naming_flags,
    warn_of_environment,
    without_usage,
)

__all__ = ["MMTokServerArgs"]


def _budget_text(value: str) -> str:
    try:
        return str(Budget.parse(value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# SGLang's own: its module's ServerArgs becomes the class below.
_add_cli_args = sglang.srt.server_args.ServerArgs.add_cli_args


class MMTokServerArgs(sglang.srt.server_args.ServerArgs, dict=True):  # type: ignore[call-arg]
    """SGLang's ServerArgs with the flags of the selection; they reach every process of a server by pickling.

    A process in which arguments with a budget are resolved installs the hooks, all of them or none, and every process
    of a server resolves them before it does anything else: none of a pruning server can run unhooked, and none of
    another server is touched. (sglang 0.5.23 srt/runtime_context.py `publish`, which `TokenizerManager` insists on and
    `run_scheduler_process` begins with, calls `resolve_once`.)

    Replaces: sglang 0.5.23 srt/server_args.py ServerArgs. Can go when SGLang lets plugins declare flags.
    """

    mmtok_budget: A[
        str | None,
        Arg(
            help="MMTok: vision tokens that an image keeps: a count (64), a share (10%% or 0.1), or all. A request "
            'overrides it with mm_processor_kwargs={"mmtok_budget": ...}. Unset: the plugin is off.',
            type_parser=_budget_text,
        ),
        NS("mm"),
    ] = None
    mmtok_min_tokens: A[
        int | None, Arg(help="MMTok: never keep fewer tokens of an image than this. Default: 1."), NS("mm")
    ] = None
    mmtok_min_tokens_in: A[
        int | None,
        Arg(
            help="MMTok: leave an image unpruned that takes fewer tokens than this in an unpruned prompt, where "
            "pruning would cost more time than it saves. Default: 0, every image is pruned."
        ),
        NS("mm"),
    ] = None
    mmtok_tv_temp: A[
        float | None,
        Arg(help="MMTok: temperature of the text-to-vision softmax. Default: the model family's preset."),
        NS("mm"),
    ] = None
    mmtok_vv_temp: A[
        float | None,
        Arg(help="MMTok: temperature of the vision-to-vision softmax. Default: the model family's preset."),
        NS("mm"),
    ] = None
    mmtok_alpha: A[
        float | None,
        Arg(help="MMTok: weight of covering the image against covering the text. Default: the family's preset."),
        NS("mm"),
    ] = None
    mmtok_coverage: A[
        Literal["multimodal", "text", "vision"] | None,
        Arg(help="MMTok: what the kept tokens cover. Default: multimodal, the text and the image."),
        NS("mm"),
    ] = None
    mmtok_guidance: A[
        Literal["keywords", "question"] | None,
        Arg(
            help="MMTok: which words of a question guide the selection: all of them (question), or those that are not "
            "in a list of English stop words (keywords). Default: the model family's preset."
        ),
        NS("mm"),
    ] = None
    mmtok_method: A[
        Literal["mmtok", "text-coverage", "vision-coverage", "divprune", "visionzip", "random", "even", "downsample"]
        | None,
        Arg(
            help="MMTok: what chooses the tokens, for comparisons. A request overrides it with "
            'mm_processor_kwargs={"mmtok_method": ...}. One that the model cannot run is an error at start. '
            "Default: mmtok."
        ),
        NS("mm"),
    ] = None
    mmtok_seed: A[
        int | None,
        Arg(help="MMTok: seed of --mmtok-method random; a request overrides it with mmtok_seed. Default: 0."),
        NS("mm"),
    ] = None
    mmtok_agent_url: A[
        str | None,
        Arg(
            help="MMTok: OpenAI-compatible endpoint (http://host:port/v1) of a small vision-language model that "
            "answers first; its answer joins the text that guides the selection. Unset: the question alone guides."
        ),
        NS("mm"),
    ] = None
    mmtok_agent_model: A[
        str | None, Arg(help="MMTok: the agent's name at its endpoint. Default: default."), NS("mm")
    ] = None
    mmtok_agent_timeout_ms: A[
        int | None,
        Arg(
            help="MMTok: milliseconds that a request waits for the agent; then the question alone guides. "
            "Default: 1000."
        ),
        NS("mm"),
    ] = None
    mmtok_backend: A[
        Literal["auto", "torch", "triton", "onnxruntime", "tensorrt"] | None,
        Arg(
            help="MMTok: what runs the selection. Default: auto, the file of --mmtok-engine if there is one, else "
            "PyTorch. One that cannot run is an error at start."
        ),
        NS("mm"),
    ] = None
    mmtok_engine: A[
        str | None,
        Arg(help="MMTok: an ONNX file or TensorRT engine written by mmtok export selection, to run the selection."),
        NS("mm"),
    ] = None
    mmtok_engine_sha256: A[
        str | None,
        Arg(
            help="MMTok: SHA-256 that the file of --mmtok-engine must have (sha256sum), or the server does not start. "
            "Unset: any file that its manifest describes."
        ),
        NS("mm"),
    ] = None
    mmtok_onnxruntime_provider: A[
        Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"] | None,
        Arg(help="MMTok: ONNX Runtime's execution provider for an ONNX file. Default: the device's."),
        NS("mm"),
    ] = None
    mmtok_feature_cache_mb: A[
        int | None,
        Arg(
            help="MMTok: MiB of vision features kept by image on the device, so that another question about an image "
            "does not encode it again; 0 keeps none. Default: 256."
        ),
        NS("mm"),
    ] = None
    mmtok_max_image_pixels: A[
        int | None,
        Arg(
            help="MMTok: an image of more pixels is refused (HTTP 400) before it is decoded; all images of a request "
            "may have eight times as many. Default: 64,000,000; 4,194,304 for Qwen2.5-VL on a CPU, where the "
            "encoder's attention takes memory by the square of the pixels."
        ),
        NS("mm"),
    ] = None
    mmtok_max_aspect_ratio: A[
        float | None,
        Arg(help="MMTok: an image is refused whose longer side is more than this many shorter ones. Default: 200."),
        NS("mm"),
    ] = None
    mmtok_max_guidance_tokens: A[
        int | None,
        Arg(
            help="MMTok: an image is refused whose selection is guided by more tokens of text; a request may bring "
            "four times as many for all its images. Default: 16384."
        ),
        NS("mm"),
    ] = None
    mmtok_max_selection_cost: A[
        float | None,
        Arg(
            help="MMTok: a request is refused whose selections compute more gains: kept tokens x tokens x (guidance "
            "tokens + tokens), summed over its images. Default: 1e13, 2e11 on a CPU."
        ),
        NS("mm"),
    ] = None

    mmtok_trust_image_hashes: A[
        bool | None,
        Arg(
            help="MMTok: take a caller's own names of images (mm_hashes, content_hash) for their pixels, in place of "
            "refusing them with a budget. Only where every caller is trusted: two images under one name share their "
            "tokens. Default: off."
        ),
        NS("mm"),
    ] = None

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
        if self.mmtok_agent_url is not None:
            # SGLang shows the fields in the log and in `/server_info`; beside them the address is whole.
            self._mmtok_agent_url = self.mmtok_agent_url
            with naming_flags(self.__struct_fields__):
                self.mmtok_agent_url = AgentAddress(self.mmtok_agent_url).shown
        if self.mmtok_budget is not None:
            # Any preset serves: this checks the user's values, and the family is not known yet.
            with naming_flags(self.__struct_fields__):
                self._settings("qwen2.5-vl")
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
        super().resolve_once()
        if _in_detokenizer():
            return
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
            check_engine,
            check_model_impl,
            check_server,
            check_server_method,
            family_of_server,
        )
        from mmtok_sglang.families import FAMILIES

        name = family_of_server(self)
        self._mmtok_settings = self._settings(name, FAMILIES[name].max_pixels_on_cpu)
        check_model_impl(self, self._mmtok_settings)
        check_server(self)
        check_adapters(self, self._mmtok_settings)
        check_server_method(self, self._mmtok_settings)
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

    def _settings(self, family: str, max_pixels_on_cpu: int | None = None) -> Settings:
        preset = PRESETS[family]
        flags = {
            "tv_temp": self.mmtok_tv_temp,
            "vv_temp": self.mmtok_vv_temp,
            "alpha": self.mmtok_alpha,
            "coverage": self.mmtok_coverage,
        }
        minimum = 1 if self.mmtok_min_tokens is None else self.mmtok_min_tokens
        cache_mb = DEFAULT_FEATURE_CACHE_MB if self.mmtok_feature_cache_mb is None else self.mmtok_feature_cache_mb
        timeout_ms = DEFAULT_AGENT_TIMEOUT_MS if self.mmtok_agent_timeout_ms is None else self.mmtok_agent_timeout_ms
        return Settings(
            family=family,
            budget=Budget.parse(self.mmtok_budget, minimum=minimum),
            config=replace(preset.config, **{name: value for name, value in flags.items() if value is not None}),
            guidance=self.mmtok_guidance or preset.guidance,
            backend=self.mmtok_backend or "auto",
            # Absolute: the server's processes need not share a folder.
            engine=None if self.mmtok_engine is None else Path(self.mmtok_engine).absolute(),
            engine_sha256=None if self.mmtok_engine_sha256 is None else self.mmtok_engine_sha256.lower(),
            provider=self.mmtok_onnxruntime_provider,
            feature_cache_mb=cache_mb,
            min_tokens_in=self.mmtok_min_tokens_in or 0,
            method=self.mmtok_method or "mmtok",
            seed=self.mmtok_seed or 0,
            agent_url=self.__dict__.get("_mmtok_agent_url"),
            agent_model=self.mmtok_agent_model or DEFAULT_AGENT_MODEL,
            agent_timeout_ms=timeout_ms,
            limits=self._limits(max_pixels_on_cpu),
            trust_image_hashes=bool(self.mmtok_trust_image_hashes),
        )

    def _limits(self, max_pixels_on_cpu: int | None) -> Limits:
        names = ("max_image_pixels", "max_aspect_ratio", "max_guidance_tokens", "max_selection_cost")
        given = {name: value for name in names if (value := getattr(self, f"mmtok_{name}")) is not None}
        return replace(default_limits(self.device, max_pixels_on_cpu), **given)


def _in_detokenizer() -> bool:
    # It handles no images: importing processors and models for the hooks would only cost it seconds at start. Known by
    # what the process was started to run; whatever else it is, the hooks are installed.
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    return getattr(multiprocessing.current_process(), "_target", None) is run_detokenizer_process


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

        family = FAMILIES[settings.family]
        install(hooks_of(start(settings, family)), family.model_class, family.processor_class)
    _served[:] = [settings]
