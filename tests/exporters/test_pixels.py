from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor

from mmtok_bench.families import FamilyName
from mmtok_deploy.photographs import photograph
from mmtok_export.encoders import build_encoder
from mmtok_export.pixels import processor_config
from tests.exporters.encoder_cases import PHOTOGRAPHS, checkpoint, pixels_of


@pytest.mark.parametrize(
    ("family", "image_size"),
    [("llava-1.5", (336, 336)), ("qwen2.5-vl", (112, 84)), ("qwen3-vl", (128, 96)), ("glm-4.1v", (112, 84))],
)
def test_a_processor_of_the_configuration_gives_the_familys_pixels(
    tmp_path: Path, family: FamilyName, image_size: tuple[int, int]
) -> None:
    encoder = build_encoder(checkpoint(family), image_size)
    path = tmp_path / "encoder.onnx.processor_config.json"
    path.write_text(json.dumps(processor_config(image_size, encoder.pixel_layout)))
    processor = AutoImageProcessor.from_pretrained(path)
    pixels = processor(images=[photograph(PHOTOGRAPHS[0]).resize(image_size)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, pixels_of(family, image_size), rtol=0, atol=1e-5)
