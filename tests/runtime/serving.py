"""A running server and the judge of its answers."""

from __future__ import annotations

import json
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtok_bench.families import FAMILY_TRAITS, FamilyName
from mmtok_bench.server import SglangServer
from tests.runtime.chats import Chat
from tests.runtime.hand_pruned import HandPruned

__all__ = ["LOGPROB_TOLERANCE", "Served", "prunes_videos", "template_arguments"]

# float32 on both sides; what was seen is below 5e-6, a wrong position moves logprobs by more than 1e-2.
LOGPROB_TOLERANCE = 1e-4


def template_arguments(family: FamilyName, checkpoint: Path) -> tuple[str, ...]:
    """Returns the arguments by which a server takes a checkpoint's own chat template.

    By itself SGLang 0.5.23 has another one for InternVL, which leaves a mark of its processor's in the prompt.
    """
    return ("--chat-template", str(checkpoint / "chat_template.jinja")) if family == "internvl3" else ()


def prunes_videos(family: FamilyName) -> bool:
    """True for a family whose videos are pruned."""
    return family.startswith(("qwen2.5", "qwen3", "glm"))


@dataclass(frozen=True)
class Served:
    family: FamilyName
    server: SglangServer
    judge: HandPruned

    @property
    def token_px(self) -> int | None:
        """Side of the square of pixels that a token of a Qwen stands for, None for a LLaVA."""
        return FAMILY_TRAITS[self.family].token_px

    def from_cache(self, num_tokens: int) -> int:
        """Returns how many tokens of a prefix that was read before come from the prefix cache.

        For a Qwen3.5 all whole chunks of 64: at their ends SGLang keeps the states of linear attention.
        """
        return num_tokens // 64 * 64 if self.family.startswith("qwen3.5") else num_tokens

    def ask(
        self,
        chat: Chat,
        *,
        max_tokens: int = 4,
        lora_path: str | None = None,
        cache_salt: str | None = None,
        extra_key: str | None = None,
        of_server: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Returns SGLang's account of the answer to a chat, with `text` added.

        `of_server` holds more of SGLang's own fields; `fields` go to mm_processor_kwargs.
        """
        of_sglang = {"lora_path": lora_path, "cache_salt": cache_salt, "extra_key": extra_key}
        client = self.server.client()
        if timeout_s is not None:
            client = client.with_options(timeout=timeout_s, max_retries=0)
        completion = client.chat.completions.create(
            model="default",
            messages=chat.for_server(),  # type: ignore[arg-type]
            max_tokens=max_tokens,
            temperature=0,
            logprobs=True,
            top_logprobs=5,
            extra_body={
                "return_meta_info": True,
                "ignore_eos": True,
                "mm_processor_kwargs": fields or None,
                **{name: value for name, value in of_sglang.items() if value is not None},
                **(of_server or {}),
            },
        )
        choice = completion.choices[0]
        account: dict[str, Any] = choice.meta_info  # type: ignore[attr-defined]
        return {**account, "text": choice.message.content}

    def generate(
        self, prompt: str, chat: Chat, *, session: dict[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Returns the account of SGLang's own endpoint for a rendered prompt, with `text` added."""
        from tests.runtime.chats import data_url

        body = {
            "text": prompt,
            "image_data": [data_url(image) for image in chat.images],
            "video_data": [film.url for film in chat.films] or None,
            "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 5,
            "mm_processor_kwargs": fields or None,
            "session_params": session,
        }
        answer = self.post("/generate", body)
        return {**answer["meta_info"], "text": answer["text"]}

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.server.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else text

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.server.url + path, timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str) -> float:
        """Returns one of the plugin's metrics, 0 for one that was not counted yet."""
        found = re.search(rf"^mmtok:{name}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def flush_cache(self) -> None:
        self.post("/flush_cache?timeout=30")

    def check(
        self,
        chat: Chat,
        account: dict[str, Any],
        budget: float | int | list[float | int] | None = 0.1,
        guidance: list[str] | None = None,
        *,
        by_frame: bool = False,
    ) -> None:
        """Holds an answer against the hand-pruned model: tokens read, and every logprob reported."""
        prompt = self.judge.prompt(chat.for_template())
        pruned = self.judge.prune(
            prompt, chat.images, guidance or chat.guidance, budget, films=chat.films, by_frame=by_frame
        )
        assert account["prompt_tokens"] == len(pruned.embeddings)
        assert account.get("image_tokens", 0) + account.get("video_tokens", 0) == pruned.num_image_tokens
        assert self.judge.max_error(pruned, account) < LOGPROB_TOLERANCE
