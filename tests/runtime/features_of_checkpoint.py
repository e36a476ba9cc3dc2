"""Writes what images are selected by, as SGLang's model of a checkpoint computes it on a CPU, without a server.

python -m tests.runtime.features_of_checkpoint artifacts/checkpoints/qwen2.5-vl features.pt bfloat16
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests import environment  # noqa: F401 - SGLang, imported below, reads the variables that it sets


def main(checkpoint: str, path: str, dtype: str) -> None:
    """Writes [(vision, keys), ...] of two photographs, from a model of that dtype."""
    from sglang.benchmark.one_batch import load_model
    from sglang.srt import runtime_context
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
    from sglang.srt.server_args import PortArgs
    from transformers import AutoImageProcessor

    from mmtok_sglang.server_args import MMTokServerArgs
    from tests.runtime.chats import small

    arguments = MMTokServerArgs(
        model_path=checkpoint, device="cpu", dtype=dtype, max_total_tokens=1024, mmtok_budget="10%"
    )
    arguments.resolve_once()
    runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0, gpu_id=0))
    runner, _ = load_model(arguments, PortArgs.init_new(arguments), 0, 0)
    model: Any = runner.torch_runner.model
    inputs = AutoImageProcessor.from_pretrained(checkpoint)([small("coffee"), small("chelsea")], return_tensors="pt")
    counts = inputs["image_grid_thw"].prod(-1).tolist()
    items = [
        MultimodalDataItem(
            modality=Modality.IMAGE,
            feature=pixels,
            offsets=[(0, count // 4 - 1)],
            model_specific_data={"image_grid_thw": grid[None]},
        )
        for pixels, count, grid in zip(
            inputs["pixel_values"].split(counts), counts, inputs["image_grid_thw"], strict=True
        )
    ]
    with torch.no_grad():
        features = model.features_of(items)
    torch.save([(each.vision, each.keys) for each in features], path)


if __name__ == "__main__":
    main(*sys.argv[1:])
