"""What a server with a budget refuses to start with, because tokens could be pruned wrongly or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.environ import envs
from sglang.srt.model_executor.cuda_graph_config import Backend

from mmtok_deploy.backends import get_backend
from mmtok_sglang.agent_address import AgentAddress
from mmtok_sglang.disaggregation import problems_of
from mmtok_sglang.engine_file import check_engine_file
from mmtok_sglang.families import FAMILIES
from mmtok_sglang.refused_models import REFUSED_MODELS
from mmtok_sglang.settings import Settings
from mmtok_sglang.transformers_backend import TransformersModel

__all__ = [
    "UnsupportedServerError",
    "check_adapters",
    "check_agent",
    "check_backend",
    "check_embedding",
    "check_engine",
    "check_model_impl",
    "check_scale",
    "check_server",
    "check_server_method",
    "check_sharing",
    "check_skipping",
    "check_speculation",
    "check_stages",
    "check_unread_config",
    "family_of_server",
]


class UnsupportedServerError(ValueError):
    """A model or a configuration that MMTok does not prune correctly."""


def family_of_server(server_args: Any) -> str:
    """Returns the model family (a key of FAMILIES) that these resolved arguments serve.

    Raises:
        UnsupportedServerError: Another model, another vision encoder, or the other of SGLang's model implementations.
    """
    model_config = model_config_of(server_args)
    architecture = model_config.hf_config.architectures[0]
    for name, family in FAMILIES.items():
        if family.architecture == architecture:
            obstacle = family.obstacle(model_config.hf_config)
            if obstacle is not None:
                raise UnsupportedServerError(f"--mmtok-budget does not support this {architecture}: {obstacle}")
            return name
    raise _unsupported(architecture)


def check_unread_config(folder: str) -> None:
    """Raises UnsupportedServerError if a folder's config.json names a model of `REFUSED_MODELS`.

    SGLang reads the configurations of some of them with --trust-remote-code alone, and fails without naming the model.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    architecture = next(iter(config.get("architectures") or ()), "")
    if architecture in REFUSED_MODELS:
        raise _unsupported(architecture)


def _unsupported(architecture: str) -> UnsupportedServerError:
    reason = f": {REFUSED_MODELS[architecture]}" if architecture in REFUSED_MODELS else ""
    supported = ", ".join(f"{family.architecture} ({name})" for name, family in FAMILIES.items())
    return UnsupportedServerError(
        f"--mmtok-budget does not support {architecture}{reason}. Supported: {supported}. "
        "Start the server without --mmtok-budget to serve this model unpruned."
    )


def check_model_impl(server_args: Any, settings: Settings) -> None:
    """Raises UnsupportedServerError if --model-impl asks for another class of the model than the family's.

    `transformers`, which SGLang needs for a LLaVA-1.5 without a budget, may stay on the command line with one.
    """
    family = FAMILIES[settings.family]
    is_theirs = issubclass(family.model_class, TransformersModel)
    taken = ("auto", "sglang", "transformers") if is_theirs else ("auto", "sglang")
    # As the user gave it: `MMTokServerArgs` resolves it to "auto".
    if server_args.model_impl not in taken:
        raise UnsupportedServerError(
            f"--mmtok-budget prunes {family.architecture} on --model-impl {' or '.join(taken)}, got "
            f"{server_args.model_impl}: drop --model-impl"
        )


def check_server(server_args: Any) -> None:
    """Raises UnsupportedServerError if these resolved arguments take a path that goes around the hooks."""
    problems = list(_problems(resolving_view(server_args)))
    if problems:
        raise UnsupportedServerError(
            "--mmtok-budget cannot be combined with " + "; nor with ".join(problems) + ". Drop one of the two."
        )


def check_adapters(server_args: Any, settings: Settings) -> None:
    """Raises UnsupportedServerError if LoRA adapters could change what images are selected by."""
    cfg = resolving_view(server_args)
    if not cfg.enable_lora:
        return
    if not hasattr(FAMILIES[settings.family].model_class, "should_apply_lora"):
        raise UnsupportedServerError(
            f"--mmtok-budget cannot be combined with LoRA adapters (--enable-lora, --lora-paths) on {settings.family}: "
            "SGLang does not keep them out of its vision encoder. Drop one of the two."
        )
    on_the_embedding = sorted({"embed_tokens", "all"} & set(cfg.lora_target_modules or ()))
    if on_the_embedding:
        raise UnsupportedServerError(
            f"--mmtok-budget cannot be combined with LoRA adapters on the input embedding (--lora-target-modules "
            f"{' '.join(on_the_embedding)}): guidance would be embedded by another request's adapter. Name the modules "
            "of the layers alone: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
        )


def check_embedding(server_args: Any, settings: Settings) -> None:
    """Raises UnsupportedServerError if the server is to answer embedding requests, and SGLang's class does not."""
    if server_args.is_embedding and not FAMILIES[settings.family].embeds:
        raise UnsupportedServerError(
            f"--is-embedding does not run on {settings.family}: SGLang's class has no embeddings"
        )


def check_engine(server_args: Any, settings: Settings) -> None:
    """Raises EngineMismatchError if the exported file is not for this model and budget, ArtifactError if not whole."""
    model_config = model_config_of(server_args)
    family = FAMILIES[settings.family].configured(settings)
    check_engine_file(settings, family, model_config.hf_config, model_config.dtype)


def check_agent(server_args: Any, settings: Settings) -> None:
    """Raises UnsupportedServerError if the server would be its own agent, as far as its address tells."""
    if settings.agent_url is None:
        return
    address = AgentAddress(settings.agent_url)
    if address.is_served_by(server_args.host, server_args.port):
        raise UnsupportedServerError(
            f"--mmtok-agent-url {address.shown} is this server itself (--host {server_args.host} --port "
            f"{server_args.port}), which would wait for its own answer: name another one. (An sgl.Engine listens on no "
            "port: give it another port=.)"
        )


def check_backend(server_args: Any, settings: Settings) -> None:
    """Raises UnsupportedServerError if a backend of this package cannot run on the server's device.

    An exported file, and a GPU, are tried in the scheduler process: this one leaves the GPU alone.
    """
    device = torch.device(resolving_view(server_args).device)
    if settings.backend != "triton" or device.type == "cuda":
        return
    try:
        get_backend("triton", device)
    except ValueError as error:
        raise UnsupportedServerError(f"--mmtok-backend triton does not run here: {error}") from error


def check_server_method(server_args: Any, settings: Settings) -> None:
    """Raises UnsupportedServerError if the model cannot run the server's method."""
    config = model_config_of(server_args).hf_config
    obstacle = FAMILIES[settings.family].obstacle_to(settings.method, config)
    if obstacle is not None:
        raise UnsupportedServerError(f"--mmtok-method {settings.method} does not run on this model: {obstacle}")


def check_scale(settings: Settings) -> None:
    """Raises UnsupportedServerError if the model cannot read images at the server's encoder scale."""
    obstacle = FAMILIES[settings.family].obstacle_to_scale
    if settings.encoder_scale < 1 and obstacle is not None:
        raise UnsupportedServerError(
            f"--mmtok-encoder-scale {settings.encoder_scale:g} does not run on {settings.family}: {obstacle}. Drop it"
        )


def check_skipping(settings: Settings) -> None:
    """Raises UnsupportedServerError if the model's encoder cannot leave out repeated patches."""
    obstacle = FAMILIES[settings.family].obstacle_to_skipping
    if settings.skip_repeats >= 0 and obstacle is not None:
        raise UnsupportedServerError(
            f"--mmtok-skip-repeats {settings.skip_repeats} does not run on {settings.family}: {obstacle}. Drop it"
        )


def check_sharing(settings: Settings) -> None:
    """Raises UnsupportedServerError if the tiles of the model's images cannot share a budget."""
    obstacle = FAMILIES[settings.family].obstacle_to_sharing
    if settings.share_tiles and obstacle is not None:
        raise UnsupportedServerError(f"--mmtok-share-tiles does not run on {settings.family}: {obstacle}. Drop it")


def check_speculation(server_args: Any, settings: Settings) -> None:
    """Raises UnsupportedServerError if the model's answers with drafted tokens were not verified."""
    cfg = resolving_view(server_args)
    algorithm = cfg.speculative_algorithm
    family = FAMILIES[settings.family]
    verified = family.speculative_algorithms
    if algorithm is None:
        return
    if algorithm not in verified:
        raise UnsupportedServerError(
            f"--speculative-algorithm {algorithm} on {settings.family}: not verified with a budget (verified: "
            f"{', '.join(verified) or 'none'}). Drop it"
        )
    if family.drafts_are_chains and cfg.speculative_eagle_topk != 1:
        raise UnsupportedServerError(
            f"--speculative-eagle-topk {cfg.speculative_eagle_topk} on {settings.family}: trees of drafts are not "
            "verified with a budget. Set it to 1"
        )
    if cfg.enable_streaming_session:
        raise UnsupportedServerError(
            f"--speculative-algorithm {algorithm} with --enable-streaming-session: a session keeps the last token of a "
            "turn as if its keys and values were computed, which with drafts they may not be, so later turns would be "
            "answered wrongly. Drop one of them"
        )
    if algorithm != "NGRAM" and cfg.pp_size > 1:
        raise UnsupportedServerError(
            f"--speculative-algorithm {algorithm} with --pp-size {cfg.pp_size}: the draft model runs on the last "
            "stage, and images are selected on the first. Drop one of them"
        )


def check_stages(server_args: Any, settings: Settings) -> None:
    """Raises UnsupportedServerError if a pipeline of that many stages would lose a part of an image."""
    num_stages = resolving_view(server_args).pp_size
    obstacle = FAMILIES[settings.family].obstacle_to_stages(num_stages, model_config_of(server_args).hf_config)
    if obstacle is not None:
        raise UnsupportedServerError(f"--pp-size {num_stages} does not run on this model: {obstacle}")


def _problems(cfg: Any) -> Iterator[str]:
    if cfg.encoder_only or cfg.language_only or cfg.enable_adaptive_dispatch_to_encoder:
        yield "encoder disaggregation (--encoder-only, --language-only): images are processed around the plugin"
    if cfg.language_model_only:
        yield "--language-model-only: there is no vision encoder"
    yield from problems_of(cfg)
    if cfg.mm_enable_dp_encoder:
        yield "--mm-enable-dp-encoder: features before the merger are spread over the ranks"
    if cfg.attn_dp_size > 1:
        yield "attention data parallelism (--attn-dp-size, --enable-dp-attention): not verified"
    if cfg.skip_tokenizer_init:
        yield "--skip-tokenizer-init: guidance text must be tokenised"
    if cfg.rl_on_policy_target is not None:
        yield f"--rl-on-policy-target {cfg.rl_on_policy_target}: it numbers image tokens as text"
    if cfg.mm_feature_transport in ("cuda_ipc", "cuda_vmm"):
        yield (
            f"--mm-feature-transport {cfg.mm_feature_transport} (or SGLANG_USE_CUDA_IPC_TRANSPORT=1): pixels reach the "
            "scheduler as handles, around what scales and names them"
        )
    for flag in ("hicache_storage_backend", "enable_lmcache", "enable_flexkv"):
        if getattr(cfg, flag):
            yield (
                f"--{flag.replace('_', '-')}: it keeps keys and values longer than the server runs, and cache keys "
                "count changes of the weights from the server's start"
            )
    if cfg.enable_mm_global_cache:
        yield "--enable-mm-global-cache: it would share pruned embeddings without their positions"
    if cfg.cuda_graph_config is not None and cfg.cuda_graph_config.prefill.backend == Backend.FULL:
        yield "--cuda-graph-backend-prefill full: it replays positions from before the selection (use breakable)"
    if cfg.smg_grpc_mode or cfg.grpc_mode or cfg.grpc_port is not None:
        yield "gRPC serving (--smg-grpc-mode, --grpc-mode, --grpc-port): images are processed around the plugin"
    if envs.SGLANG_VIT_ENABLE_CUDA_GRAPH.get():
        yield (
            "SGLANG_VIT_ENABLE_CUDA_GRAPH=1: features before the merger stay inside those graphs. Unset it: with a "
            "budget, the vision encoder has graphs of its own"
        )
    if envs.SGLANG_RUST_SERVER.get():
        yield "SGLANG_RUST_SERVER: the Rust server processes images itself"
