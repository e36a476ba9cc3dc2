"""A program that uses sgl.Engine as its documentation shows, run by test_offline_engine.py."""

from __future__ import annotations

import json
import sys

import sglang

if __name__ == "__main__":
    model_path, image, prompt, budget = sys.argv[1:]
    engine = sglang.Engine(
        model_path=model_path,
        mmtok_budget=budget,
        mmtok_encoder_scale=0.5,
        dtype="float32",
        max_total_tokens=4096,
        max_running_requests=2,
    )
    question = {
        "prompt": prompt,
        "image_data": [image],
        "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 5,
    }
    half = {"mm_processor_kwargs": {"mmtok_budget": "50%", "mmtok_encoder_scale": 1}}
    results = [
        engine.generate(**question),
        engine.generate(**question, **half),
        engine.loop.run_until_complete(engine.async_generate(**question, **half)),
        list(engine.generate(**question, **half, stream=True))[-1],
    ]
    for result in results:
        print("RESULT " + json.dumps(result["meta_info"]))
    try:
        engine.generate(**question, mm_processor_kwargs={"mmtok_budget": "ten"})
    except ValueError as error:
        print(f"REFUSED {error}")
    engine.shutdown()
