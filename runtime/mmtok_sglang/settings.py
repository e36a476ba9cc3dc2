"""What a server was started with, resolved against its model family's preset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from mmtok_deploy.auto_budget import AutoBudget
from mmtok_deploy.budget import Budget
from mmtok_deploy.config import KeySource, SelectionConfig
from mmtok_deploy.executors import ExecutorName
from mmtok_deploy.guidance import GuidanceRule
from mmtok_deploy.methods import MethodName, check_method, coverage_of, needs_frames, reads_keys
from mmtok_deploy.presets import PRESETS
from mmtok_deploy.shown import shown
from mmtok_sglang.agent_address import AgentAddress
from mmtok_sglang.flags import Flag, Help, flags_of
from mmtok_sglang.limits import Limits

__all__ = [
    "FLAGS",
    "MAX_SEED",
    "Settings",
    "VideoBudget",
    "check_budget",
    "check_encoder_scale",
    "check_skip_repeats",
    "check_frame_method",
    "check_video_budget",
]

VideoBudget = Literal["video", "frame"]

MAX_SEED = 2**63 - 1
"""The largest seed; a larger number could not be sent to the scheduler process."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One server's selection settings; every process of the server holds the same.

    A field with a `Help` is a --mmtok-* flag: a new one needs nothing else. Its default holds where the flag is not
    given.

    Args:
        family: Key of `mmtok_deploy.presets.PRESETS`, and of `families.FAMILIES`.
        budget: Tokens an image keeps where the request names no budget of its own.
        config: Temperatures and weight; what is covered is the method's.
        auto: The bounds of the budget "auto", the server's or a request's; the minimum is the budget's.
        limits: What a request is refused for.
        flush_count: The path of the number of flushes that the server's tokenizer processes share.

    Raises:
        ValueError: An unknown guidance rule or method, a backend without the file that it runs or the other way
            round, a method that the backend does not run, or a negative number.
    """

    family: str
    budget: Annotated[
        Budget | AutoBudget,
        Help("""vision tokens that an image keeps: a count (64), a share (10%% or 0.1), all, or auto, a share by what
        its question asks and how much of it is blank. A request overrides it with
        mm_processor_kwargs={"mmtok_budget": ...}. Unset: the plugin is off."""),
    ]
    config: SelectionConfig
    guidance: Annotated[
        GuidanceRule,
        Help("""which words of a question guide the selection: all of them (question), or those that are not in a list
        of English stop words (keywords). Default: the model family's preset."""),
    ]
    backend: Annotated[
        ExecutorName,
        Help("""what runs the selection. Default: auto, the file of --mmtok-engine if there is one, else Triton on
        NVIDIA GPUs from compute capability 8.0 on, else PyTorch. One that cannot run is an error at start."""),
    ] = "auto"
    engine: Annotated[
        Path | None,
        Help("an ONNX file or TensorRT engine written by mmtok export selection, to run the selection."),
    ] = None
    engine_sha256: Annotated[
        str | None,
        Help("""SHA-256 that the file of --mmtok-engine must have (sha256sum), or the server does not start. Unset: any
        file that its manifest describes."""),
    ] = None
    onnxruntime_provider: Annotated[
        Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"] | None,
        Help("ONNX Runtime's execution provider for an ONNX file. Default: the device's."),
    ] = None
    # 43 images of LLaVA-1.5 7B, 15 of a megapixel on Qwen2.5-VL 7B: those of the conversations at hand.
    feature_cache_mb: Annotated[
        int,
        Help("""MiB of vision features kept by image on the device, so that another question about an image does not
        encode it again; 0 keeps none. Default: 256."""),
    ] = 256
    min_tokens_in: Annotated[
        int,
        Help("""leave an image unpruned that takes fewer tokens than this in an unpruned prompt, where pruning would
        cost more time than it saves. Default: 0, every image is pruned."""),
    ] = 0
    encoder_scale: Annotated[
        float,
        Help("""scale each side of an image by this before the vision encoder reads it, above 0 and at most 1: at 0.5
        an image has a quarter of its patches and tokens, and the budget keeps its share, or count, of those. For a Qwen
        alone. A request overrides it with mm_processor_kwargs={"mmtok_encoder_scale": ...}. Default: 1."""),
    ] = 1.0
    skip_repeats: Annotated[
        int,
        Help("""leave tokens of an image out of the vision encoder whose pixels differ from those of the token to the
        left or above by at most this, of 255: 0 leaves out exact repetitions, as of blank paper. The budget keeps
        tokens of the others; all keeps all others. For a Qwen alone. A request overrides it with
        mm_processor_kwargs={"mmtok_skip_repeats": ...}. Default: -1, the encoder reads whole images."""),
    ] = -1
    share_tiles: Annotated[
        bool,
        Help("""select from all tiles of an image at once, so that they share the image's budget, in place of as many
        tokens of each tile. For LLaVA-NeXT alone. Default: off."""),
    ] = False
    method: Annotated[
        MethodName,
        Help("""what chooses the tokens, for comparisons. A request overrides it with
        mm_processor_kwargs={"mmtok_method": ...}. One that the model cannot run is an error at start.
        Default: mmtok."""),
    ] = "mmtok"
    keys: Annotated[
        KeySource,
        Help("""what image tokens are compared with each other by: the features that go into the projector, or merger
        (input, as published), or the tokens that come out of it (output). For the methods mmtok, vision-coverage, scope
        and apet. A request overrides it with mm_processor_kwargs={"mmtok_keys": ...}. Default: input."""),
    ] = "input"
    video_budget: Annotated[
        VideoBudget,
        Help("""what a budget is shared by within a video: coverage over all of its frames at once (video), or its
        frames evenly, each selected by itself (frame). A request overrides it with
        mm_processor_kwargs={"mmtok_video_budget": ...}. Default: video."""),
    ] = "video"
    seed: Annotated[int, Help("seed of --mmtok-method random; a request overrides it with mmtok_seed. Default: 0.")] = 0
    # Not shown: it may hold credentials.
    agent_url: Annotated[
        str | None,
        Help("""OpenAI-compatible endpoint (http://host:port/v1) of a small vision-language model that answers first;
        its answer joins the text that guides the selection. Unset: the question alone guides."""),
    ] = field(default=None, repr=False)
    agent_model: Annotated[str, Help("the agent's name at its endpoint. Default: default.")] = "default"
    agent_timeout_ms: Annotated[
        int,
        Help("milliseconds that a request waits for the agent; then the question alone guides. Default: 1000."),
    ] = 1000
    auto: AutoBudget = field(default_factory=AutoBudget)
    limits: Limits = field(default_factory=Limits)
    trust_image_hashes: Annotated[
        bool,
        Help("""take a caller's own names of images (mm_hashes, content_hash) for their pixels, in place of refusing
        them with a budget. Only where every caller is trusted: two images under one name share their tokens.
        Default: off."""),
    ] = False

    flush_count: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, family: str, given: Mapping[str, Any], limits: Limits) -> Settings:
        """Returns a server's settings.

        Args:
            family: The model's.
            given: The value of each flag that is given, by its name; the budget parsed, and `auto` for its bounds.
            limits: Those of a server that sets none.
        """
        preset = PRESETS[family]
        values: dict[str, Any] = {"guidance": preset.guidance, **given}
        if "engine" in values:
            # Absolute: the server's processes need not share a folder.
            values["engine"] = Path(values["engine"]).absolute()
        if "engine_sha256" in values:
            values["engine_sha256"] = values["engine_sha256"].lower()
        for name in _OF_THE_BUDGET:
            values.pop(name, None)
        config = {each.name: values.pop(each.name) for each in fields(SelectionConfig) if each.name in values}
        limited = {each.name: values.pop(each.name) for each in fields(Limits) if each.name in values}
        return cls(family=family, config=replace(preset.config, **config), limits=replace(limits, **limited), **values)

    def __post_init__(self) -> None:
        check_video_budget(self.video_budget)
        _check_key_source(self.keys)
        if self.guidance not in get_args(GuidanceRule):
            raise ValueError(f"guidance is one of {', '.join(get_args(GuidanceRule))}, got {self.guidance!r}")
        if self.backend in ("onnxruntime", "tensorrt") and self.engine is None:
            raise ValueError(f"--mmtok-backend {self.backend} runs an exported file: add --mmtok-engine FILE")
        if self.backend in ("torch", "triton") and self.engine is not None:
            raise ValueError(
                f"--mmtok-backend {self.backend} runs no exported file: drop --mmtok-engine, or the backend"
            )
        if self.onnxruntime_provider is not None and self.engine is None:
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
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is from 0 to {MAX_SEED}, got {self.seed}")
        check_encoder_scale(self.encoder_scale, self.check_method(self.method))
        check_skip_repeats(self.skip_repeats, self.method)
        check_budget(self.budget, self.method)
        check_frame_method(self.method, self.video_budget)
        self._check_agent()

    def check_method(self, method: object) -> MethodName:
        """Returns the method if this server's backend runs it.

        Raises:
            ValueError: It does not, or there is none of that name.
        """
        name = check_method(method)
        if name != self.executor_method and (self.engine is not None or self.backend not in ("auto", "torch")):
            runs = self.backend if self.engine is None else self.engine.name
            raise ValueError(
                f"{runs} runs the method {self.executor_method} alone, not {name}: start the server with "
                "--mmtok-backend torch"
            )
        return name

    def check_keys(self, keys: object, method: MethodName) -> KeySource:
        """Returns what the method compares tokens by if this server's backend runs it so; "input" if it compares none.

        Args:
            keys: What the request asks for, or the server's own setting.
            method: What chooses the request's tokens.

        Raises:
            ValueError: There are no such features, or the backend's file or kernels are for the others.
        """
        source = _check_key_source(keys)
        if not reads_keys(method):
            return "input"
        if source != self.keys and (self.engine is not None or self.backend not in ("auto", "torch")):
            runs = self.backend if self.engine is None else self.engine.name
            raise ValueError(
                f"keys {source} is not what {runs} runs on this server, which compares tokens by the projector's "
                f"{self.keys}: ask for {self.keys}, or start the server with --mmtok-backend torch"
            )
        return source

    @property
    def executor_method(self) -> MethodName:
        """The method that the backend or the exported file runs; PyTorch's operations run all others."""
        return "mmtok" if coverage_of(self.method) is None else self.method

    @property
    def executor_config(self) -> SelectionConfig:
        """The constants of `executor_method`."""
        return replace(self.config, coverage=coverage_of(self.executor_method) or self.config.coverage)

    @property
    def executor_keys(self) -> KeySource:
        """The side of the projector by whose features the backend or the exported file compares tokens."""
        return self.keys if reads_keys(self.executor_method) else "input"

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
        return {f"mmtok_{name}": _shown(name, attrgetter(path)(self)) for name, path in _PATHS.items()}


def check_encoder_scale(value: object, method: MethodName) -> float:
    """Returns the encoder scale if it is one, and the method goes with it.

    Raises:
        ValueError: It is no number above 0 and at most 1, or the method sizes images itself.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"encoder_scale is a number above 0 and at most 1, got {shown(value)}")
    if value < 1 and method == "downsample":
        raise ValueError(
            f"encoder_scale {value:g} does not go with the method downsample, which scales images to the budget "
            "itself: take 1, or another method"
        )
    return float(value)


def check_skip_repeats(value: object, method: MethodName) -> int:
    """Returns the largest difference of repeated pixels if it is one, and the method goes with it.

    Raises:
        ValueError: It is no whole number from -1 to 255, or the method has another image encoded.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 255:
        raise ValueError(f"skip_repeats is a whole number from -1 (off) to 255, got {shown(value)}")
    if value >= 0 and method == "downsample":
        raise ValueError(
            f"skip_repeats {value} does not go with the method downsample, which has all of a smaller image encoded: "
            "take -1, or another method"
        )
    return value


def check_budget(budget: Budget | AutoBudget, method: MethodName) -> None:
    """Raises ValueError if the method cannot run at the budget: `downsample` has one for all images of a request."""
    if isinstance(budget, AutoBudget) and method == "downsample":
        raise ValueError(
            "budget auto does not go with the method downsample, which scales images to a budget: take a share or a "
            "count, or another method"
        )


def check_frame_method(method: MethodName, video_budget: VideoBudget) -> None:
    """Raises ValueError if each frame by itself is chosen from by a method that goes by frames."""
    if needs_frames(method) and video_budget == "frame":
        raise ValueError(
            f"method {method} shares a video's budget among its frames itself, which video_budget frame does, too: "
            "take video_budget video, or another method"
        )


def check_video_budget(value: object) -> VideoBudget:
    """Returns what shares a video's budget.

    Raises:
        ValueError: It is none of `VideoBudget`.
    """
    known: VideoBudget = _one_of(get_args(VideoBudget), value, "video_budget")
    return known


def _check_key_source(value: object) -> KeySource:
    known: KeySource = _one_of(get_args(KeySource), value, "keys")
    return known


def _one_of(names: tuple[Any, ...], value: object, setting: str) -> Any:
    """Returns the name that a value equals.

    Raises:
        ValueError: It equals none.
    """
    for known in names:
        if value == known:
            return known
    raise ValueError(f"{setting} is one of {', '.join(names)}, got {shown(value)}")


_CONFIG_HELP = {
    "tv_temp": "temperature of the text-to-vision softmax. Default: the model family's preset.",
    "vv_temp": "temperature of the vision-to-vision softmax. Default: the model family's preset.",
    "alpha": "weight of covering the image against covering the text. Default: the family's preset.",
}

_AUTO_HELP = {
    "auto_min": "the smallest share (10%% or 0.1) that the budget auto keeps of an image. Default: none.",
    "auto_max": "the largest share that the budget auto keeps of an image. Default: none.",
}
_OF_THE_BUDGET = ("min_tokens", *_AUTO_HELP)

FLAGS: tuple[Flag, ...] = (
    *flags_of(Settings),
    Flag("min_tokens", int, "MMTok: never keep fewer tokens of an image than this. Default: 1."),
    *(Flag(name, str, f"MMTok: {text}") for name, text in _AUTO_HELP.items()),
    *(Flag(name, get_type_hints(SelectionConfig)[name], f"MMTok: {text}") for name, text in _CONFIG_HELP.items()),
    *flags_of(Limits),
)
"""Every --mmtok-* flag."""

_PATHS = {
    **{each.name: each.name for each in flags_of(Settings)},
    "min_tokens": "budget.minimum",
    **{name: f"auto.{name}" for name in _AUTO_HELP},
    **{name: f"config.{name}" for name in _CONFIG_HELP},
    **{each.name: f"limits.{each.name}" for each in flags_of(Limits)},
}
"""Where a setting is that a flag gives."""


def _shown(name: str, value: Any) -> Any:
    if name == "agent_url" and value is not None:
        return AgentAddress(value).shown
    if isinstance(value, Fraction):
        value = Budget(ratio=value)
    return str(value) if isinstance(value, Budget | AutoBudget | Path) else value
