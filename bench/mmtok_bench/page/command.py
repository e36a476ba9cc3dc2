"""Runs `mmtok demo --page`."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import torch
import uvicorn
from rich.console import Console

from mmtok_bench.families import FAMILY_TRAITS, PocketFamily
from mmtok_bench.page.app import PageContent, make_app
from mmtok_bench.page.patches import Patches
from mmtok_bench.page.pictures import Pictures
from mmtok_bench.page.served import RunningServer, Served, StartedServer
from mmtok_bench.pocket import PICTURE_PX, pocket_checkpoint
from mmtok_bench.quality.bench import quality_server
from mmtok_bench.run import quiet_transformers
from mmtok_bench.selected_patches import OneGridFamily, PatchSelector
from mmtok_bench.server import ServerError
from mmtok_deploy.methods import IMAGE_METHODS, MethodName
from mmtok_deploy.presets import PRESETS, Preset

__all__ = ["content_of", "serve_page"]

_MODEL_TYPES: Mapping[str, OneGridFamily] = {"llava": "llava-1.5", "qwen2_5_vl": "qwen2.5-vl"}
_NAMES: Mapping[PocketFamily, str] = {"llava-1.5": "LLaVA-1.5", "qwen2.5-vl": "Qwen2.5-VL"}
_HELD_OPEN_S = 1


def serve_page(arguments: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C or SIGTERM; returns 0.

    Raises:
        ServerError: The page's port is taken, or the server of --url does not answer or does not prune.
        ValueError: The page cannot show patches of the checkpoint folder.
    """
    quiet_transformers()
    console = Console(highlight=False)
    with _listening(arguments.host, arguments.port) as listener, contextlib.ExitStack() as stack:
        content: PageContent
        served: Served
        if arguments.url is None:
            content = _pocket_content(arguments.family)
            log = arguments.folder / "logs" / "page.log"
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            pocket = pocket_checkpoint(arguments.family), arguments.family
            served = stack.enter_context(StartedServer(partial(quality_server, *pocket, device, log_path=log)))
        else:
            served = RunningServer(arguments.url)
            content = content_of(served.url, served.info, arguments.model_path)
        host, port = arguments.host, listener.getsockname()[1]
        app = make_app(replace(content, budget=arguments.budget), served, host)
        shown = f"[{host}]" if ":" in host else host
        console.print(f"Open http://{shown}:{port} in a browser. Ctrl-C ends the page.", markup=False, soft_wrap=True)
        if not _is_loopback(host):
            console.print(f"Whoever reaches {host} can use the page: it asks for no password.", style="yellow")
        config = uvicorn.Config(
            *(app,), log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=_HELD_OPEN_S
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a listening socket; opened before any server starts, so that a port that is taken is reported at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            # A browser that connects before the page is ready waits and is not refused.
            listener.listen()
        except OSError as error:
            raise ServerError(
                f"the page cannot be served at {host}, port {port} ({error.strerror or error}): give another --port, "
                "or 0 for any that is free"
            ) from error
        yield listener


def _pocket_content(family: PocketFamily) -> PageContent:
    return PageContent(
        model=f"A pocket {_NAMES[family]} that this project trained on scenes like these.",
        notes="The pocket model was trained on scenes: for photographs, look only at the patches, not at its answers. "
        "Its language model is so small that pruning saves hardly any time: look at the tokens.",
        privacy="Pictures and questions stay on the machine on which mmtok demo --page runs.",
        methods=_methods(family),
        pictures=Pictures(PICTURE_PX[family]),
        patches=Patches(partial(PatchSelector, family, pocket_checkpoint(family))),
    )


def content_of(url: str, info: Mapping[str, Any], model_path: Path | None) -> PageContent:
    """Returns the page's content for a running server; with patches if this machine has its model.

    Args:
        url: Address of the server, without a path.
        info: Result of `server_info`.
        model_path: A folder with the checkpoint that it serves.

    Raises:
        ValueError: The folder holds no checkpoint whose patches can be shown.
    """
    name = str(info.get("model_path", "a model"))
    place = urlsplit(url).hostname or url
    is_here = _is_loopback(place)
    pockets = {str(pocket_checkpoint(family)): family for family in get_args(PocketFamily)}
    pocket = pockets.get(name)
    if model_path is None and pocket is not None:
        model_path = Path(name)
    family = None if model_path is None else _family_of(model_path)
    patches, why = None, ""
    differing = _unlike_here(info)
    if model_path is None or family is None:
        why = (
            "The patches are not shown: the server says how many tokens it keeps and not which, and this page has no "
            "copy of its model to compute them with. Give it one: --model-path FOLDER, the checkpoint that is served."
        )
    elif differing:
        why = f"The patches are not shown: the server was started with {differing}, which this page does not follow."
    else:
        patches = Patches(partial(PatchSelector, family, model_path, _preset_of(family, info)))
    return PageContent(
        model=f"{name}, served at {url}.",
        privacy=f"Pictures and questions are sent to the server at {place}"
        + (", which is this machine." if is_here else ": they leave the machine on which this page's program runs."),
        methods=_methods(family) if family is not None else IMAGE_METHODS,
        pictures=Pictures(PICTURE_PX[pocket]) if pocket is not None else Pictures(PICTURE_PX["qwen2.5-vl"]),
        patches=patches,
        no_patches=why,
    )


def _methods(family: OneGridFamily) -> tuple[MethodName, ...]:
    return tuple(name for name in IMAGE_METHODS if name not in FAMILY_TRAITS[family].impossible_methods)


def _family_of(checkpoint: Path) -> OneGridFamily:
    try:
        kind = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise ValueError(f"--model-path is the folder of a checkpoint, {checkpoint} is none: {error}") from error
    if kind not in _MODEL_TYPES:
        known = ", ".join(_MODEL_TYPES)
        raise ValueError(
            f"the page draws patches of models of {known}, and {checkpoint} is of {kind}: drop --model-path"
        )
    return _MODEL_TYPES[kind]


def _preset_of(family: OneGridFamily, info: Mapping[str, Any]) -> Preset:
    """Returns the constants of the server's selection."""
    preset = PRESETS[family]
    names = ("tv_temp", "vv_temp", "alpha")
    given = {name: info[f"mmtok_{name}"] for name in names if info.get(f"mmtok_{name}") is not None}
    guidance = info.get("mmtok_guidance") or preset.guidance
    return Preset(replace(preset.config, **given), guidance)


def _unlike_here(info: Mapping[str, Any]) -> str:
    """Returns the server's flags that make it keep other tokens than this process computes."""
    usual = {
        **{"mmtok_min_tokens": 1, "mmtok_min_tokens_in": 0, "mmtok_encoder_scale": 1.0, "mmtok_skip_repeats": -1},
        **{"mmtok_agent_url": None, "mmtok_keys": "input", "mm_process_config": None},
    }
    # SGLang shows a process configuration that is not given as {}.
    found = [name for name, value in usual.items() if info.get(name) not in (None, {}, value)]
    return " and ".join(f"--{name.replace('_', '-')}" for name in found)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
