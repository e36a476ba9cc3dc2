"""A prefill server and a decode server without an accelerator, which Mooncake or NIXL connects."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import openai
import pytest

from mmtok_bench.families import FamilyName
from mmtok_bench.server import SglangServer
from mmtok_soak.second_plugin import plugin_environment
from tests.runtime.chats import Chat
from tests.runtime.conftest import judge_of, make_server
from tests.runtime.hook_faults import Faults
from tests.runtime.serving import Served

__all__ = ["Disaggregated", "Transfer", "make_pair", "obstacle_to"]

Transfer = Literal["mooncake", "nixl"]

# Package on PyPI, and a module that needs all of its libraries.
_PACKAGES: dict[Transfer, tuple[str, str]] = {
    "mooncake": ("mooncake-transfer-engine-non-cuda", "mooncake.engine"),
    "nixl": ("nixl", "nixl._api"),
}

_ROOMS = itertools.count(1)


def obstacle_to(transfer: Transfer) -> str | None:
    """Returns why servers cannot exchange keys and values in this way here; None if they can."""
    package, module = _PACKAGES[transfer]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"needs {package} from PyPI"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{package} lacks a library: {error}"
    return None


def run_without_a_gpu() -> None:
    """Changes what keeps SGLang 0.5.23 from transferring keys and values between servers without a GPU.

    By Mooncake, a prefill server copies the cache's indices in a CUDA stream. By NIXL, both servers register all memory
    as that of a GPU.
    """
    if obstacle_to("mooncake") is None:
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

        MooncakeKVSender.supports_host_tensor_indices = False
    if obstacle_to("nixl") is None:
        agent = importlib.import_module("nixl._api").nixl_agent
        for name in ("register_memory", "get_xfer_descs", "prep_xfer_dlist"):
            setattr(agent, name, _on_host(getattr(agent, name)))


def _on_host(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def on_host(*args: Any) -> Any:
        return method(*("DRAM" if isinstance(each, str) and each == "VRAM" else each for each in args))

    return on_host


def make_pair(
    folder: Path,
    family: FamilyName,
    *arguments: str,
    transfer: Transfer = "mooncake",
    of_decode: tuple[str, ...] = (),
    **environment: Any,
) -> tuple[SglangServer, SglangServer]:
    """Returns a prefill server and a decode server.

    Args:
        folder: An empty folder, which has to stay while the servers run.
        family: Family of the tiny checkpoint.
        *arguments: Arguments of both servers.
        transfer: How keys and values get from one to the other.
        of_decode: Arguments of the decode server, after those.
        **environment: Environment variables of both.
    """
    shared = (
        *arguments,
        f"--disaggregation-transfer-backend={transfer}",
        f"--disaggregation-bootstrap-port={SglangServer('').port}",
        # The overlapping loop sends a cached prefix by a CUDA event.
        "--disable-overlap-schedule",
    )
    plugin = plugin_environment(folder, "transfer_on_cpu", f"{__name__}:run_without_a_gpu", Path(__file__).parents[2])
    # With the plugins that the caller has for it.
    plugins = os.pathsep.join(filter(None, (plugin["PYTHONPATH"], environment.pop("PYTHONPATH", ""))))
    environment |= {
        "PYTHONPATH": plugins,
        "MC_FORCE_TCP": "1",
        "MOONCAKE_PROTOCOL": "tcp",
        "SGLANG_HOST_IP": "127.0.0.1",
    }
    prefill = make_server(family, *shared, "--disaggregation-mode=prefill", **environment)
    # Its default backup of retracted requests is memory that CUDA pins.
    backup = "--disaggregation-decode-retraction-backup=cpu_tensor"
    decode = make_server(family, *shared, "--disaggregation-mode=decode", backup, *of_decode, **environment)
    return prefill, decode


@dataclass(frozen=True)
class Disaggregated:
    """A running pair of servers, asked as a router asks it: one request to both, with a room in which they meet."""

    family: FamilyName
    prefill: Served
    decode: Served
    port: int
    faults: Faults

    @staticmethod
    def bootstrap_port(prefill: SglangServer) -> int:
        """Returns the port at which a decode server hears of a prefill server."""
        flag = "--disaggregation-bootstrap-port="
        (port,) = (each.removeprefix(flag) for each in prefill.args if each.startswith(flag))
        return int(port)

    @classmethod
    def of(cls, family: FamilyName, pair: tuple[SglangServer, SglangServer], faults: Faults) -> Disaggregated:
        """Returns a pair of running servers; `faults` makes both fail, if they have its environment."""
        prefill, decode = (Served(family, server, judge_of(family)) for server in pair)
        return cls(family, prefill, decode, cls.bootstrap_port(pair[0]), faults)

    def ask(self, chat: Chat, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns both servers' accounts of the answer to a chat; the decode server's answer is the whole one."""
        room = self._room()
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(each.ask, chat, of_server=room, **fields) for each in (self.prefill, self.decode)]
            return both[0].result(), both[1].result()

    def errors(self, chat: Chat) -> list[openai.APIStatusError]:
        """Returns both servers' errors for a chat, which have to come within 10 s."""
        room = self._room()

        def ask(served: Served) -> openai.APIStatusError:
            with pytest.raises(openai.APIStatusError) as refusal:
                served.ask(chat, of_server=room, timeout_s=10)
            return refusal.value

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(ask, (self.prefill, self.decode)))

    def ask_decode(self, chat: Chat) -> dict[str, Any]:
        """Returns the decode server's account of a request that the prefill server is not asked."""
        return self.decode.ask(chat, of_server=self._room())

    def _room(self) -> dict[str, Any]:
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.port, "bootstrap_room": next(_ROOMS)}
