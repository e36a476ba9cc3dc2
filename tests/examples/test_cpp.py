"""The C++ example, built and run: an image in, the tokens out that ONNX Runtime gives in Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from mmtok_bench.families import FamilyName
from mmtok_deploy.cli import main
from mmtok_deploy.photographs import photograph
from mmtok_export.encoders import build_encoder
from mmtok_export.pixels import CLIP_SCALE, images_of, patches_of, processor_config
from tests.exporters.encoder_cases import checkpoint

SOURCES = Path(__file__).parents[2] / "examples" / "cpp"
INCLUDES = [Path("/usr/local/include"), Path("/usr/include")]
HEADER = "onnxruntime/onnxruntime_cxx_api.h"
IMAGE_SIZES: dict[FamilyName, tuple[int, int]] = {"llava-1.5": (336, 336), "qwen2.5-vl": (168, 112)}


@pytest.fixture(scope="module")
def encode_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    includes = [folder / HEADER for folder in INCLUDES if (folder / HEADER).is_file()]
    missing = [tool for tool in ("g++", "cmake") if shutil.which(tool) is None]
    if missing or not includes:
        needed = ", ".join(missing or [f"{HEADER} (Debian's libonnxruntime-dev; .ci/run says how)"])
        pytest.skip(f"not installed: {needed}")
    build = tmp_path_factory.mktemp("cpp")
    # The library that Python has, under the name by which programs load it.
    library = build / "libonnxruntime.so.1"
    library.symlink_to(next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")))
    places = [f"-DONNXRUNTIME_INCLUDE_DIR={includes[0].parent}", f"-DONNXRUNTIME_LIBRARY={library}"]
    flags = ["-DCMAKE_CXX_FLAGS=-Werror", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", str(SOURCES), "-B", str(build), *places, *flags], check=True, timeout=120)
    subprocess.run(["cmake", "--build", str(build)], check=True, timeout=300)
    return build / "encode_image"


@pytest.mark.parametrize(("family", "dtype"), [("llava-1.5", "float16"), ("qwen2.5-vl", "float32")])
def test_encodes_an_image(encode_image: Path, tmp_path: Path, family: FamilyName, dtype: str) -> None:
    width, height = IMAGE_SIZES[family]
    encoder, image, text, tokens = (tmp_path / name for name in ("encoder.onnx", "a.ppm", "text.f32", "tokens.f32"))
    arguments = [f"--model={checkpoint(family)}", "--budget=9", f"--dtype={dtype}", f"--output={encoder}"]
    assert main(["export", "encoder", *arguments, f"--image-size={width}x{height}", "--skip-check"]) == 0
    photograph("astronaut").resize((width, height)).save(image)
    session = onnxruntime.InferenceSession(encoder, providers=["CPUExecutionProvider"])
    shape = {each.name: each.shape for each in session.get_inputs()}
    words = np.random.default_rng(0).standard_normal((7, shape["text"][2]), dtype=np.float32)
    words.tofile(text)
    run = subprocess.run(
        [encode_image, encoder, image, text, tokens], capture_output=True, text=True, check=True, timeout=120
    )
    # The same library on the same numbers: the pixels are those of this project's own processor, to the last bit.
    layout = build_encoder(checkpoint(family), (width, height)).pixel_layout
    photographs = images_of((width, height), 1, **layout)
    pixels = patches_of(photographs, **layout) if layout["layout"] == "patches" else photographs
    inputs = {
        "pixels": pixels.numpy(),
        "text": words[None].astype(dtype),
        "text_mask": np.ones((1, 7), dtype=bool),
        "excluded": np.zeros(shape["excluded"], dtype=bool),
    }
    outputs = {each.name for each in session.get_outputs()}
    names = ["kept", "visual_tokens", *({"positions"} & outputs)]
    kept, visual_tokens, *positions = session.run(names, inputs)
    lines = np.array([[int(number) for number in line.split()] for line in run.stdout.splitlines()])
    assert lines.T.tolist() == [kept[0].tolist(), *(axis for each in positions for axis in each[0].tolist())]
    assert bool(positions) == (family != "llava-1.5")
    found = np.fromfile(tokens, dtype=np.float32).reshape(visual_tokens[0].shape)
    np.testing.assert_allclose(found, visual_tokens[0].astype(np.float32), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"P6\n56 56\n255\n" + bytes(56 * 56 * 3), "is 56x56: scale it to 168x112"),
        (b"P5\n168 112\n255\n" + bytes(168 * 112), "is not a binary PPM"),
        (b"P6\n168 112\n255\n" + bytes(100), "is not a binary PPM"),
    ],
)
def test_a_wrong_image(encode_image: Path, tmp_path: Path, content: bytes, message: str) -> None:
    encoder, image = tmp_path / "encoder.onnx", tmp_path / "a.ppm"
    layout = {"layout": "patches", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, **CLIP_SCALE}
    config = processor_config((168, 112), layout)
    (tmp_path / "encoder.onnx.processor_config.json").write_text(json.dumps(config))
    image.write_bytes(content)
    command = [encode_image, encoder, image, tmp_path / "text.f32", tmp_path / "tokens.f32"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (1, "")
    assert message in run.stderr
