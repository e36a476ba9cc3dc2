"""Holds a pruned server against the hand-pruned model in float32, both on one device, with a mistake as control.

    python -m tests.runtime.device_logprobs artifacts/logprobs --family qwen2.5-vl

A row has the largest difference of the logprobs over all chats, and the smallest that two mistakes make: the tokens of
another question, and for a Qwen the positions of the first tokens in place of their own. On CUDA a LLaVA is served in
float32, a Qwen and an InternVL in float16: SGLang's norms for NVIDIA GPUs, which its own model classes use, take 16-bit
numbers alone. With `--prefill graphs` a LLaVA is served in float16, too: SGLang captures nothing with its attention for
float32. The row then also has how far the hand-pruned model itself is from float32 if its language model computes in
float16.

With `--drafts`, tokens are drafted from earlier text, by a draft model that is made for the checkpoint, or by the head
of a Qwen3.5. The row then has the number of right ones.

With `--encoder graphs`, the vision encoder is replayed for the last images, also of families whose encoder a server
does not replay.

The exit code is 0 if each mistake makes at least ten times the difference. In float16: if each makes at least five
times the difference, and it is at most twice that of the model itself; wrong positions of a Qwen3.5 hardly show there.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from mmtok_bench.client import MeasurementError, in_parallel
from mmtok_bench.families import FamilyName
from mmtok_bench.results import append_row, make_row
from mmtok_bench.run import quiet_transformers, run_command
from mmtok_bench.server import make_server
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_soak.second_plugin import plugin_environment
from tests.runtime import replayed_encoders
from tests.runtime.chats import Chat, small
from tests.runtime.emulated_speculation import speculation_environment
from tests.runtime.films import film
from tests.runtime.hand_pruned import HandPruned, Pruned
from tests.runtime.serving import Served, template_arguments
from tests.runtime.tiny_drafts import DRAFTS, draft_arguments

BENCH = "device-logprobs"
_BUDGET = 0.1
_CHATS = (
    Chat.ask(small("coffee"), "What is in this cup?"),
    Chat.ask(small("chelsea", 448, 280), "How many cats are on the red table?"),
    Chat.ask(small("coffee"), small("astronaut", 280, 448), "Which of both is darker?"),
)
# With the first of those, four images of one size, one by one: the encoder is captured at the third.
_OF_ONE_SIZE = tuple(Chat.ask(small(name), "What is shown here?") for name in ("rocket", "motorcycle", "astronaut"))
_OTHER_QUESTION = "Is there a person, a boat or a yellow car in front of the mountain?"
_ON_CUDA = (
    *("--mm-attention-backend=sdpa", "--sampling-backend=pytorch", "--disable-decode-cuda-graph"),
    *("--max-total-tokens=16384", "--mem-fraction-static=0.5"),
)
_HALF = ("--dtype=float16", "--attention-backend=triton")
# TensorFloat-32 keeps 10 bits of a float32's 23.
_FULL = ("--dtype=float32", "--attention-backend=torch_native")
# The attention of SGLang's encoders that can be captured.
_ENCODER = {"eager": (), "graphs": ("--mm-attention-backend=triton_attn",)}
# With chunks, so that an image's tokens lie in several replays.
_PREFILL = {"eager": ("--disable-prefill-cuda-graph",), "graphs": ("--chunked-prefill-size=64",)}
# A LLaVA's prefills are captured only if its server is told to.
_CAPTURED = ("--cuda-graph-backend-prefill=breakable", "--cuda-graph-bs-prefill", "8", "16", "32", "64")


def film_chats() -> tuple[Chat, ...]:
    """Returns the chats about videos; their files are encoded by FFmpeg."""
    return (
        Chat.ask(film(), "Where does the square go?"),
        Chat.ask(film(12, 5.0, seed=1), small("coffee"), "What colour is the square, and what the cup?"),
        Chat.ask(film(seed=2), "What moves?")
        .then("assistant", "A square.")
        .then("user", small("chelsea"), "And here?"),
    )


def measure(
    served: Served,
    chats: Sequence[Chat] = _CHATS,
    in_half: HandPruned | None = None,
    more: Sequence[Chat] = (),
) -> dict[str, float]:
    """Returns the largest difference of the chats, and the smallest that each mistake makes.

    They are asked one after another, and once more all at once: in one batch, and behind cached prefixes.

    Args:
        served: The server, and the hand-pruned model in float32.
        chats: What is asked.
        in_half: The hand-pruned model in float16; with it, `half_error` is its own difference.
        more: Further chats, in which no mistake is made.

    Raises:
        MeasurementError: An answer does not say what its images' tokens cover.
    """
    judge, of_question, of_positions, of_half = served.judge, [], [], []
    errors = []
    asked = [*chats, *more]
    alone = [served.ask(chat) for chat in asked]
    together = in_parallel(len(asked), served.ask, asked)
    accounts_of_all = [account["mmtok"][0] for account in (*alone, *together)]
    for image in (image for account in accounts_of_all for image in (*account["images"], *account["videos"])):
        # Both come from the device, without waiting for it.
        if not 0 < (image["coverage"] or 0) <= image["coverage_bound"] <= 1:
            raise MeasurementError(f"expected 0 < coverage <= coverage_bound <= 1, an answer says {image}")
    for chat, *accounts in zip(asked, alone, together, strict=True):
        prompt, films = judge.prompt(chat.for_template()), chat.films
        prune = partial(judge.prune, prompt, chat.images, budget=_BUDGET, films=films)
        pruned = prune(chat.guidance)
        of_chat = [judge.max_error(pruned, account) for account in accounts]
        print(f"{chat.guidance}: logprobs differ by {max(of_chat):.2e}")
        errors += of_chat
        if in_half is not None:
            of_half.append(judge.max_error(pruned, _answer_of(in_half, pruned, accounts[0])))
        if chat in more:
            continue
        other = prune([_OTHER_QUESTION] * (len(chat.images) + len(films)))
        of_question.append(judge.max_error(other, accounts[0]))
        if served.family.startswith("qwen"):
            of_positions.append(judge.max_error(prune(chat.guidance, original_positions=False), accounts[0]))
    return {
        "num_correct_drafts": sum(account.get("spec_num_correct_drafts", 0) for account in (*alone, *together)),
        "max_error": max(errors),
        "question_error": min(of_question),
        **({"position_error": min(of_positions)} if of_positions else {}),
        **({"half_error": max(of_half)} if of_half else {}),
    }


def _answer_of(in_half: HandPruned, pruned: Pruned, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a server's answer with the logprobs that the model in float16 gives the same tokens."""
    ids = [token for _, token, _ in answer["output_token_logprobs"]]
    logprobs = in_half.logprobs(replace(pruned, embeddings=pruned.embeddings.half()), ids)
    top = [
        [(logprobs[step, token].item(), token, text) for _, token, text in each]
        for step, each in enumerate(answer["output_top_logprobs"])
    ]
    return {**answer, "output_top_logprobs": top}


def is_right(family: str, metrics: Mapping[str, float]) -> bool:
    """Whether the differences are those of rounding, and the mistakes' are not."""
    error, is_half = metrics["max_error"], "half_error" in metrics
    mistakes = [metrics["question_error"], metrics.get("position_error", math.inf)]
    if is_half and family.startswith("qwen3.5"):
        # Three of its four layers have no positions.
        mistakes.pop()
    is_rounding = not is_half or error <= 2 * metrics["half_error"]
    return is_rounding and min(mistakes) >= (5 if is_half else 10) * error


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="tests.runtime.device_logprobs")
    parser.add_argument("folder", type=Path, help="for the row, the checkpoint and the server's log")
    parser.add_argument("--family", choices=get_args(FamilyName), required=True)
    parser.add_argument("--prefill", choices=tuple(_PREFILL), default="eager", help="default %(default)s")
    parser.add_argument("--encoder", choices=tuple(_ENCODER), default="eager", help="default %(default)s")
    parser.add_argument("--drafts", choices=("none", *DRAFTS), default="none", help="default %(default)s")
    parser.add_argument("--videos", action="store_true", help="chats about videos, for a Qwen2.5-VL or Qwen3-VL")
    parser.add_argument("--server-args", type=shlex.split, default=[], help="further arguments of the server")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default %(default)s")
    arguments = parser.parse_args(argv)
    return run_command("device_logprobs", lambda: _run(arguments))


def _encoder_environment(encoder: str, folder: Path) -> dict[str, str]:
    if encoder == "eager":
        return {"SGLANG_VIT_ENABLE_CUDA_GRAPH": "0"}
    target = f"{replayed_encoders.__name__}:{replayed_encoders.register.__name__}"
    return plugin_environment(folder, "mmtok_test_encoders", target, Path(__file__).parents[2])


def _run(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    family, device = arguments.family, torch.device(arguments.device)
    on_cpu = device.type == "cpu"
    is_half = not on_cpu and not (family.startswith("llava") and arguments.prefill == "eager")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checkpoint = make_tiny_checkpoint(family, arguments.folder / "checkpoints" / family)
    judge = HandPruned(family, checkpoint, device)
    name = f"{family}-{arguments.prefill}-encoder-{arguments.encoder}-drafts-{arguments.drafts}"
    has_drafts = arguments.drafts != "none"
    server = make_server(
        checkpoint,
        family,
        *("--enable-cache-report", "--enable-metrics", f"--mmtok-budget={_BUDGET:.0%}"),
        *template_arguments(family, checkpoint),
        *(() if on_cpu else (*_ON_CUDA, *(_HALF if is_half else _FULL), *_PREFILL[arguments.prefill])),
        *(() if on_cpu else _ENCODER[arguments.encoder]),
        *(draft_arguments(arguments.drafts, judge.model, arguments.folder / name) if has_drafts else ()),
        *(_CAPTURED if arguments.prefill == "graphs" and family.startswith("llava") else ()),
        *arguments.server_args,
        on_cpu=on_cpu,
        # States of linear attention as precise as the model, which is float16 there.
        env={
            "NVIDIA_TF32_OVERRIDE": "0",
            **({} if on_cpu else {"SGLANG_MAMBA_CONV_DTYPE": "float16"}),
            **_encoder_environment(arguments.encoder, arguments.folder),
            **(speculation_environment(arguments.folder) if on_cpu and has_drafts else {}),
        },
        log_path=arguments.folder / f"{name}.log",
    )
    in_half = HandPruned(family, checkpoint, device) if is_half else None
    if in_half is not None:
        in_half.model.half()
    chats = film_chats() if arguments.videos else _CHATS
    with server:
        served = Served(family, server, judge)
        metrics = measure(served, chats, in_half, _OF_ONE_SIZE if arguments.encoder == "graphs" else ())
        metrics["num_encoder_replays"] = served.metric("vision_encoder_replays_total")
        prefills = re.findall(r"Prefill batch.*cuda graph: (True|False)", server.log_text())
    metrics |= {"num_prefills": len(prefills), "num_replayed": prefills.count("True")}
    case = {"family": family, "prefill": arguments.prefill, "encoder": arguments.encoder}
    case |= {"media": "videos"} if arguments.videos else {}
    case |= {"drafts": arguments.drafts} if has_drafts else {}
    row = make_row(BENCH, case, "sglang", metrics, num_runs=len(chats), device=device)
    append_row(arguments.folder / "device-logprobs.jsonl", row)
    print(metrics)
    return 0 if is_right(family, metrics) else 1


if __name__ == "__main__":
    sys.exit(main())
