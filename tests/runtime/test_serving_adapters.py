"""LoRA adapters with a budget: each request's own, whatever the others of the same image have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmtok_bench.families import FamilyName
from mmtok_bench.server import ServerError, running
from tests.runtime.chats import Chat, small
from tests.runtime.conftest import checkpoint, judge_of, make_server
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.other_weights import make_adapter, with_adapter
from tests.runtime.serving import Served
from tests.runtime.unpinned_memory import unpinned_environment

# Long enough for a chunk of 64 tokens, by which a Qwen3.5's prefixes are held.
QUESTION = "What is in this cup, what is on the table around it, and who may have put it there this morning?"
LORA = ["--lora-backend=torch_native", "--max-loras-per-batch=3", "--mmtok-budget=10%", "--enable-metrics"]


pytestmark = pytest.mark.slow


# The families whose models SGLang lets have adapters; with a budget they are refused on the others.
@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3.5"])
def test_every_adapter_has_its_own_tokens_in_the_cache(family: FamilyName, tmp_path: Path) -> None:
    base = checkpoint(family)
    # The experts' projections are one tensor of all.
    modules = ("o_proj",) if family.endswith("-moe") else ("o_proj", "down_proj")
    adapters = {name: make_adapter(base, tmp_path / name, seed, modules) for seed, name in enumerate(("one", "other"))}
    judges: dict[str | None, HandPruned] = {None: judge_of(family)}
    for name, path in adapters.items():
        judges[name] = HandPruned(family, with_adapter(base, path, tmp_path / f"merged-{name}"))
    paths = [f"{name}={path}" for name, path in adapters.items()]
    server = make_server(family, *LORA, "--lora-paths", *paths, num_ranks=1, **unpinned_environment(tmp_path))
    chat = Chat.ask(small("coffee"), QUESTION)

    def ask(adapter: str | None) -> dict[str, Any]:
        served = Served(family, server, judges[adapter])
        account = served.ask(chat, lora_path=adapter)
        served.check(chat, account)
        return account

    with running(server):
        for adapter in (None, "one", "other"):
            assert ask(adapter)["cached_tokens"] == 0
        for adapter in ("other", None, "one"):
            account = ask(adapter)
            assert account["cached_tokens"] == Served(family, server, judges[adapter]).from_cache(
                account["prompt_tokens"] - 1
            )
        # An adapter of the same name, with other weights.
        served = Served(family, server, judges[None])
        served.post("/unload_lora_adapter", {"lora_name": "one"})
        served.post("/load_lora_adapter", {"lora_name": "one", "lora_path": str(adapters["other"])})
        judges["one"] = judges["other"]
        assert ask("one")["cached_tokens"] == 0
        assert ask(None)["cached_tokens"] > 0


def test_an_adapter_on_the_input_embedding_ends_the_start(tmp_path: Path) -> None:
    adapter = make_adapter(checkpoint("qwen2.5-vl"), tmp_path / "one", 0, ("embed_tokens", "o_proj"))
    server = make_server(
        "qwen2.5-vl", *LORA, "--lora-paths", f"one={adapter}", num_ranks=1, **unpinned_environment(tmp_path)
    )
    with pytest.raises(ServerError, match="LoRA adapters on the input embedding"), running(server):
        pass
