"""Times what a tokenizer process does with requests of one photograph, one at a time, without a scheduler behind it.

    python -m tests.runtime.tokenizer_process --model qwen2.5-vl-0.5b --image-px 1008x672

The process is SGLang's, with a budget of 10%; what it sends is received and thrown away. Prints the median milliseconds
of each stage that the metrics have, and of a request from its text to the end of sending.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from mmtok_bench.arguments import image_size
from mmtok_bench.dummy_models import write_dummy_model
from mmtok_bench.load_images import load_image_url
from mmtok_bench.server import cpu_environment

_STAGES = ("decode", "preprocess", "hash", "transport")
_NUM_WARM_UPS, _NUM_REQUESTS = 5, 30
_QUESTION = "What is in the middle of this picture, and which colours does it have?"
_PROMPTS = {
    "qwen2.5-vl-0.5b": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n",
    "llava-1.5-0.5b": "USER: <image>\n{} ASSISTANT:",
}


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(prog="tests.runtime.tokenizer_process")
    parser.add_argument("--model", choices=_PROMPTS, default="qwen2.5-vl-0.5b")
    parser.add_argument("--image-px", type=image_size, default=(1008, 672))
    arguments = parser.parse_args()
    os.environ.update(cpu_environment())
    with tempfile.TemporaryDirectory() as folder:
        manager = _make_manager(write_dummy_model(arguments.model, Path(folder) / arguments.model))
        times_ms = asyncio.run(_measure(manager, _PROMPTS[arguments.model].format(_QUESTION), arguments.image_px))
    for name, values in times_ms.items():
        print(f"{name:12}{statistics.median(values):8.1f} ms", flush=True)
    # Its threads and sockets would keep the process from ending.
    os._exit(0)


def _make_manager(model_path: Path) -> Any:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.srt.server_args
    import zmq
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.runtime_context import publish

    arguments: Any = sglang.srt.server_args.ServerArgs(
        model_path=str(model_path), device="cpu", load_format="dummy", mmtok_budget="10%"
    )
    publish(arguments, role="tokenizer")
    ports = sglang.srt.server_args.PortArgs.init_new(arguments)
    manager = TokenizerManager(arguments, ports)
    receiver = zmq.Context().socket(zmq.PULL)
    receiver.connect(ports.scheduler_input_ipc_name)

    def receive() -> None:
        while True:
            receiver.recv()

    threading.Thread(target=receive, daemon=True).start()
    return manager


async def _measure(manager: Any, prompt: str, image_px: tuple[int, int]) -> dict[str, list[float]]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    from mmtok_sglang.metrics import collectors

    times_ms: dict[str, list[float]] = {name: [] for name in (*_STAGES, "request")}
    for number in range(_NUM_WARM_UPS + _NUM_REQUESTS):
        url = load_image_url("photograph", image_px, image_px, str(number))
        request = GenerateReqInput(text=prompt, image_data=[url], sampling_params={"max_new_tokens": 1})
        request.normalize_batch_and_arguments()
        manager._init_req_state(request, None)
        before = [collectors()[f"image_{name}_milliseconds"]._sum.get() for name in _STAGES]
        start_s = time.perf_counter()
        await manager._send_one_request(await manager._tokenize_one_request(request))
        taken_ms = 1000 * (time.perf_counter() - start_s)
        if number >= _NUM_WARM_UPS:
            for name, then in zip(_STAGES, before, strict=True):
                times_ms[name].append(collectors()[f"image_{name}_milliseconds"]._sum.get() - then)
            times_ms["request"].append(taken_ms)
    return times_ms


if __name__ == "__main__":
    main()
