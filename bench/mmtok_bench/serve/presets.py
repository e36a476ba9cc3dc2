"""What is measured on which machine: models, image sizes, budgets and loads; and how flags change it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mmtok_bench.families import FAMILY_TRAITS, FamilyName
from mmtok_bench.load_images import Shown
from mmtok_deploy.methods import MethodName, check_method, needs_frames

__all__ = ["QUESTIONS", "SERVE_PRESETS", "ImageKind", "PrefixCache", "ServePlan", "ServedModel", "Size", "plan_of"]

ImageKind = Literal[Shown, "random"]
PrefixCache = Literal["off", "on"]
Size = tuple[int, int]
"""Width and height in pixels."""

QUESTIONS = (
    "What is in the middle of this picture, and which colours does it have? Answer in one short sentence.",
    "How many different things can be seen in this picture? Name the largest one in one short sentence.",
    "Where was this picture taken, inside or outside? Say in one short sentence how it can be seen.",
    "Is there a person, an animal or a machine in this picture? Say in one short sentence where it is.",
    "Which part of this picture is the darkest, and what is there? Answer in one short sentence.",
    "What could have been there a minute before this picture was taken? Say it in one short sentence.",
)
"""The questions about photographs."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of a preset.

    Args:
        name: Name in rows and on the command line: one of `DUMMY_MODELS`, or the name of a checkpoint's folder.
        family: The model's family.
        sizes_px: Image sizes that are sent.
        budgets: Values of `--mmtok-budget` beside `all`; 10%@0.5 adds `--mmtok-encoder-scale`.
        model_path: A checkpoint; None for the model without weights of this name.
        sends_png: Whether photographs are sent as PNGs to every server: without the plugin, SGLang 0.5.23 fails on
            JPEGs for a LLaVA on CUDA.
        most_at_once: How many of the model's servers fit into the memory of the preset's GPU; 1 if not tried.
        beside_others: Arguments that limit a server's memory so that this number fits.
        is_only_by_name: Whether it is measured only if `--models` names it.
    """

    name: str
    family: FamilyName
    sizes_px: tuple[Size, ...]
    budgets: tuple[str, ...]
    model_path: str | None = None
    sends_png: bool = False
    most_at_once: int = 1
    beside_others: tuple[str, ...] = ()
    is_only_by_name: bool = False


@dataclass(frozen=True, slots=True)
class ServePlan:
    """Everything that one run of `mmtok bench serve` measures.

    Args:
        preset: The preset's name.
        device: The servers' device.
        models: The models, measured one after another.
        concurrencies: Requests at a time.
        image_kinds: Photographs, pages of text, random pixels.
        prefix_caches: "off": servers without prefix cache, every image new. "on": images that the server has seen
            before, each with another question; or new images, each with several questions.
        questions_per_image: Questions about an image, one after another.
        images_in_turn: How many images are asked about in turn, which is the distance between two questions about one
            image; None is the concurrency.
        num_requests: The least number of requests of each case and round.
        requests_per_client: The least number of requests, as a multiple of the concurrency.
        output_tokens: Length of every answer.
        rounds: How often each case is measured; the servers take turns.
        side_by_side: Whether all servers of a model run at once, and idle ones sleep. Otherwise this holds only for
            models of which enough servers fit into the GPU; for other models, one server runs at a time.
        one_server: Whether the requests ask one server for every budget, instead of a server for each budget; the
            server without the plugin runs before or after it.
        other_methods: Methods beside MMTok, for which the servers with a budget are asked.
        arguments: Arguments of every server.
        user_arguments: Further arguments from the command line; rows name them.
    """

    preset: str
    device: Literal["cpu", "cuda"]
    models: tuple[ServedModel, ...]
    concurrencies: tuple[int, ...]
    image_kinds: tuple[ImageKind, ...] = ("photograph",)
    prefix_caches: tuple[PrefixCache, ...] = ("off",)
    questions_per_image: tuple[int, ...] = (1,)
    images_in_turn: int | None = None
    num_requests: int = 32
    requests_per_client: int = 2
    output_tokens: int = 64
    rounds: int = 5
    side_by_side: bool = False
    one_server: bool = False
    other_methods: tuple[MethodName, ...] = ()
    arguments: tuple[str, ...] = ()
    user_arguments: tuple[str, ...] = ()

    def images_of(self, concurrency: int, questions: int) -> int:
        """Returns the number of images of one case in one round."""
        num_requests = max(self.num_requests, self.requests_per_client * concurrency)
        if questions == 1:
            return num_requests
        return max(math.ceil(num_requests / questions), self.images_in_turn or 1)


# The paper's Tables 12 and 13: 867.6 tokens on average to 86.8 (1008 x 672 pixels are 864), up to 2880 to 160, and 576
# to 64. The smaller images show where pruning no longer pays.
_NEXT_SIZES: tuple[Size, ...] = ((672, 672), (672, 336))
_GPU_MODELS = (
    ServedModel("qwen2.5-vl-7b", "qwen2.5-vl", ((1008, 672), (448, 448), (224, 224)), ("20%", "10%", "5%")),
    # 1024 x 768 pixels are 768 tokens.
    ServedModel("qwen3-vl-8b", "qwen3-vl", ((1024, 768), (512, 512), (256, 256)), ("20%", "10%", "5%")),
    ServedModel("qwen3.5-9b", "qwen3.5", ((1024, 768),), ("10%",), is_only_by_name=True),
    ServedModel("llava-next-7b", "llava-next", _NEXT_SIZES, ("160",), sends_png=True),
    ServedModel("llava-next-13b", "llava-next", _NEXT_SIZES, ("160",), sends_png=True),
    # 12 tiles and a thumbnail: 3328 tokens.
    ServedModel("internvl3-8b", "internvl3", ((1024, 768),), ("20%", "10%", "5%"), is_only_by_name=True),
    ServedModel("internvl3.5-8b", "internvl3", ((1024, 768),), ("20%", "10%", "5%"), is_only_by_name=True),
    ServedModel("llava-1.5-7b", "llava-1.5", ((336, 336),), ("64",), sends_png=True),
    ServedModel("llava-1.5-13b", "llava-1.5", ((336, 336),), ("64",), sends_png=True),
    ServedModel("qwen2-vl-7b", "qwen2-vl", ((1008, 672),), ("10%",), is_only_by_name=True),
    ServedModel("glm-4.1v-9b", "glm-4.1v", ((1008, 672),), ("10%",), is_only_by_name=True),
)


# In bfloat16 their weights alone take 65, 61 and 70 GB.
_H200_MODELS = (
    ServedModel("qwen2.5-vl-32b", "qwen2.5-vl", ((1008, 672),), ("10%",)),
    ServedModel("qwen3-vl-30b-a3b", "qwen3-vl-moe", ((1024, 768),), ("10%",)),
    ServedModel("qwen3.5-35b-a3b", "qwen3.5-moe", ((1024, 768),), ("10%",), is_only_by_name=True),
)

# The servers of Qwen2.5-VL-7B fit side by side, each with room for the keys and values of 65 unpruned requests. Those
# of a LLaVA-NeXT would have room for five, and a budget would gain from that.
_BESIDE_OTHERS = ("--mem-fraction-static=0.85", "--max-total-tokens=60000")
_ON_H200 = (
    *(replace(_GPU_MODELS[0], most_at_once=4, beside_others=_BESIDE_OTHERS), *_GPU_MODELS[1:]),
    *_H200_MODELS,
)


def _gpu(name: str, concurrencies: tuple[int, ...], models: tuple[ServedModel, ...] = _GPU_MODELS) -> ServePlan:
    kinds: tuple[ImageKind, ...] = ("photograph", "random")
    # On an H200, one tokenizer process prepares 20 to 28 images per second, fewer than a pruning server can answer.
    tokenizers = ("--tokenizer-worker-num=4",)
    return ServePlan(
        name, "cuda", models, concurrencies, image_kinds=kinds, prefix_caches=("off", "on"), arguments=tokenizers
    )


SERVE_PRESETS: Mapping[str, ServePlan] = {
    # 48 GB: a 13B model in half precision leaves room for 8 images of 2928 tokens at a time.
    "a6000": _gpu("a6000", (1, 4, 16)),
    "h100": _gpu("h100", (1, 4, 16, 64)),
    "h200": _gpu("h200", (1, 4, 16, 64), _ON_H200),
    "cpu": ServePlan(
        "cpu",
        "cpu",
        (
            ServedModel("qwen2.5-vl-0.5b", "qwen2.5-vl", ((1008, 784), (224, 224)), ("10%",)),
            ServedModel("llava-1.5-0.5b", "llava-1.5", ((448, 448),), ("10%",)),
            ServedModel("qwen3-vl-0.5b", "qwen3-vl", ((1024, 768),), ("10%",), is_only_by_name=True),
            # The published size: an encoder and a language model in their real proportion.
            ServedModel("qwen2.5-vl-3b", "qwen2.5-vl", ((392, 392),), ("50%", "25%", "11%"), is_only_by_name=True),
        ),
        concurrencies=(1, 4),
        # A request takes seconds, so there are few requests, but as many rounds as on a GPU.
        num_requests=2,
        requests_per_client=1,
        output_tokens=8,
        side_by_side=True,
        # Measured on an EPYC with AVX-512 BF16: products four to six times as fast as in float32.
        arguments=("--dtype=bfloat16",),
    ),
}


def preset_for_device(name: str | None) -> str:
    """Returns the preset for an accelerator of this name; "cpu" for None.

    An accelerator without a preset gets the one for the smallest memory, a6000.
    """
    if name is None:
        return "cpu"
    return next((preset for preset in ("h200", "h100") if preset in name.lower()), "a6000")


def plan_of(arguments: argparse.Namespace, device_name: str | None) -> ServePlan:
    """Returns a preset's plan, changed by the flags.

    Args:
        arguments: The arguments of `mmtok bench serve`.
        device_name: Name of the accelerator; None without one.

    Raises:
        ValueError: Flags contradict each other, the preset does not have a model, or a folder holds no checkpoint.
    """
    plan = SERVE_PRESETS[arguments.preset or preset_for_device(device_name)]
    if plan.device == "cuda" and device_name is None and not arguments.dry_run:
        raise ValueError(f"preset {plan.preset} is for a GPU, and PyTorch sees none here: --preset cpu, or --dry-run")
    models = _models(arguments, plan)
    ours = [argument for argument in arguments.server_args if argument.startswith("--mmtok")]
    if ours:
        raise ValueError(
            f"--server-args go to every server, and the one without a budget would not start with {ours[0]}: drop it; "
            "--budgets says what is pruned"
        )
    if max(arguments.questions_per_image or (1,)) > len(QUESTIONS):
        raise ValueError(f"--questions-per-image is at most {len(QUESTIONS)}: there are no more questions")
    if arguments.image_px:
        models = [replace(model, sizes_px=tuple(arguments.image_px)) for model in models]
    others = tuple(_other_method(name, models) for name in arguments.methods or () if name != "mmtok")
    if arguments.budgets:
        budgets = tuple(budget for budget in arguments.budgets if budget != "all")
        models = [replace(model, budgets=budgets) for model in models]
    given = {
        "concurrencies": arguments.concurrency,
        "image_kinds": arguments.image_kinds,
        "prefix_caches": arguments.prefix_cache,
        "questions_per_image": arguments.questions_per_image,
        "images_in_turn": arguments.images_in_turn,
        "num_requests": arguments.num_requests,
        "output_tokens": arguments.output_tokens,
        "rounds": arguments.rounds,
        "one_server": arguments.one_server,
    }
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value}
    return replace(
        plan, models=tuple(models), other_methods=others, user_arguments=tuple(arguments.server_args), **given
    )


def _other_method(name: str, models: Sequence[ServedModel]) -> MethodName:
    """Returns the method of this name, if it selects tokens of images, and every model can run it.

    Raises:
        ValueError: It does not, or one of them cannot.
    """
    method = check_method(name)
    if method == "downsample" or needs_frames(method):
        why = "is measured anyway" if method == "downsample" else "goes by the frames of a video"
        raise ValueError(f"--methods are of selecting an image's tokens, {method} {why}: drop it")
    for model in models:
        if method in FAMILY_TRAITS[model.family].impossible_methods:
            raise ValueError(f"{model.family} does not run {method}: drop it, or {model.name} from --models")
    return method


def _models(arguments: argparse.Namespace, plan: ServePlan) -> list[ServedModel]:
    if arguments.model_path is None:
        if arguments.family is not None:
            raise ValueError("--family is of a checkpoint: give it with --model-path")
        known = {model.name: model for model in plan.models}
        names = arguments.models or [name for name, model in known.items() if not model.is_only_by_name]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"preset {plan.preset} has {', '.join(known)}; got {unknown[0]!r}")
        return [known[name] for name in names]
    if arguments.models:
        raise ValueError("--models chooses from a preset, --model-path names one checkpoint: give one of them")
    if arguments.family is None:
        raise ValueError(f"--model-path needs --family, one of {', '.join(get_args(FamilyName))}")
    folder = arguments.model_path
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model-path {folder} holds no config.json: expected the folder of a checkpoint")
    like = next(model for model in (*plan.models, *_GPU_MODELS, *_H200_MODELS) if model.family == arguments.family)
    return [replace(like, name=folder.resolve().name, model_path=str(folder), is_only_by_name=False)]
