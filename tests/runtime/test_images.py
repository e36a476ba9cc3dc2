from __future__ import annotations

import asyncio
import base64
import io
import socket
import struct
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from sglang.srt.utils import ImageData

from mmtok_sglang.images import ImageLoader, _size_in_header, decoded
from mmtok_sglang.limits import Limits, default_limits
from mmtok_soak.images import icon_of, jpeg_of_scans, tiff_of_one_tile

LIMITS = Limits(max_image_pixels=10_000, max_aspect_ratio=10)


def encoded(width: int = 20, height: int = 10, mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 3).save(buffer, kind)
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def load(*images: Any, max_mb: int = 64) -> list[Any]:
    server_args = SimpleNamespace(media_url_max_file_size_mb=max_mb)
    return asyncio.run(ImageLoader(LIMITS).load(images, server_args))


def test_each_source_gives_the_same_bytes(tmp_path: Path) -> None:
    data, file = encoded(), tmp_path / "an image.png"
    file.write_bytes(data)
    sources = [data, data_url(data), base64.b64encode(data).decode(), str(file), file.as_uri()]
    assert load(*sources) == [data] * len(sources)
    (wrapped,) = load(ImageData(url=data_url(data), detail="low"))
    assert (wrapped.url, wrapped.detail) == (data, "low")


def test_what_is_no_raw_image_is_left_to_sglang() -> None:
    features = {"format": "processor_output"}
    assert load(features, None) == [features, None]
    assert decoded(features) is features


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA", "1", "I;16"])
def test_decoded_images_are_rgb_as_sglang_makes_them(mode: str) -> None:
    data = encoded(mode=mode)
    image = Image.open(io.BytesIO(data))
    expected = image if image.mode == "RGB" else image.convert("RGB")
    for source in (data, Image.open(io.BytesIO(data)), ImageData(url=data_url(data))):
        (loaded,) = load(source)
        rgb = decoded(loaded)
        assert (rgb.mode, rgb.tobytes()) == ("RGB", expected.tobytes())


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (101, 100, r"101 x 100 = 10,100 pixels, this server takes 10,000 \(--mmtok-max-image-pixels\)"),
        (1, 11, r"one side 11 times the other; this server takes 10 times \(--mmtok-max-aspect-ratio\)"),
        (44, 4, "one side 11 times the other"),
    ],
)
def test_sizes_are_bounded(width: int, height: int, message: str) -> None:
    data = encoded(width, height)
    for source in (data, data_url(data), Image.open(io.BytesIO(data))):
        with pytest.raises(ValueError, match=message):
            load(source)
    assert load(encoded(100, 100), encoded(1, 10), encoded(40, 4))


def test_the_size_is_read_before_anything_is_decoded() -> None:
    # The header says 1.6 GB, the file ends after it.
    data = encoded(100, 100, kind="BMP")
    huge = data[:18] + (20_000).to_bytes(4, "little") * 2 + data[26:60]
    with pytest.raises(ValueError, match="an image is too large to be read"):
        load(huge)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (icon_of(encoded(2000, 2000)), "is of the format ICO, this server takes AVIF, BMP"),
        (encoded(16, 16, kind="ICO"), "is of the format ICO"),
        (encoded(16, 16, kind="ICNS"), "is of the format ICNS"),
        (encoded(16, 16, kind="EPS"), "is of the format EPS"),
        (jpeg_of_scans(101), "is a JPEG of 101 scans, this server takes 100"),
        (tiff_of_one_tile(112), r"112 x 112 = 12,544 pixels, this server takes 10,000"),
    ],
    ids=["icon", "small icon", "ICNS", "EPS", "scans", "tile"],
)
def test_a_header_that_does_not_say_what_decoding_takes_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(data)


@pytest.mark.parametrize(
    "start",
    [
        b"P6\n#" + b"a" * (8 << 20),
        b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"%a\n" * (3 << 20),
        b"a: b\n" * (2 << 20),
        b"\xff\xd8" + b"\xff\xe1\0\2" * (2 << 20),
        b"\xff\xd8" + b"\xff" * (8 << 20),
        b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * (4 << 20),
    ],
    ids=["PPM", "EPS", "lines", "JPEG segments", "JPEG fill", "GIF"],
)
def test_a_header_in_millions_of_parts_is_given_up(start: bytes) -> None:
    start_s = time.thread_time()
    with pytest.raises(ValueError, match="an image cannot be read"):
        _size_in_header(start, LIMITS)
    # Read to the end each takes 4 s and more.
    assert time.thread_time() - start_s < 2


def test_a_header_of_many_parts_is_read() -> None:
    data = encoded(kind="JPEG")
    assert _size_in_header(data[:2] + b"\xff\xe1\0\2" * 1000 + data[2:], LIMITS) == (20, 10)


def uncompressed_by_python() -> dict[str, bytes]:
    """Returns files of 1000 x 1000 pixels of which Pillow decodes each pixel, or run of them, in Python."""
    side = struct.pack("<ii", 1000, 1000)
    runs = (b"\1\5" * 1000 + b"\0\0") * 1000 + b"\0\1"
    bitmap = struct.pack("<I8sHHIIiiII", 40, side, 1, 8, 1, len(runs), 0, 0, 256, 0) + bytes(1024) + runs
    sizes, masks = (124, 0x1007, 1000, 1000, 0, 0, 0), (32, 64, 0, 16, 0xF800, 0x07E0, 0x001F, 0)
    surface = struct.pack("<7I44x8I5I", *sizes, *masks, 4096, 0, 0, 0, 0)
    return {
        "PPM of text": b"P3\n1000 1000\n255\n" + b"1 " * 3_000_000,
        "PPM of 100 values": b"P6\n1000 1000\n100\n" + b"1" * 3_000_000,
        "BMP of runs": b"BM" + struct.pack("<IHHI", 14 + len(bitmap), 0, 0, 14 + 40 + 1024) + bitmap,
        "DDS of 5, 6, 5 bits": b"DDS " + surface + b"\7" * 2_000_000,
    }


@pytest.mark.parametrize("name", ["PPM of text", "PPM of 100 values", "BMP of runs", "DDS of 5, 6, 5 bits"])
def test_what_python_would_decode_pixel_by_pixel_is_refused(name: str) -> None:
    data = uncompressed_by_python()[name]
    assert Image.open(io.BytesIO(data)).size == (1000, 1000)
    with pytest.raises(
        ValueError, match=f"of an encoding of {name[:3]} that is decoded byte by byte .* as PNG or JPEG"
    ):
        _size_in_header(data, Limits())


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_usual_bitmaps_are_taken(mode: str) -> None:
    for kind in ("PPM", "BMP", "TGA", "PCX", "TIFF"):
        assert decoded(load(encoded(mode=mode, kind=kind))[0]).mode == "RGB"


def test_scans_and_tiles_of_usual_files_are_taken() -> None:
    for data in (jpeg_of_scans(100), tiff_of_one_tile(96)):
        assert decoded(load(data)[0]).mode == "RGB"


@pytest.mark.parametrize("source", ["data:image/png;base64,AAAA", b"", b"no image", "\0", "/no/such/file", "data:,"])
def test_what_is_no_image_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="an image cannot be read"):
        load(source)


def test_a_truncated_image_is_refused_where_it_is_decoded() -> None:
    data = encoded(90, 90, kind="BMP")
    (half,) = load(data[: len(data) // 2])
    with pytest.raises(ValueError, match="an image cannot be decoded"):
        decoded(half)


def test_images_of_a_request_are_bounded_together() -> None:
    data = encoded(100, 100)
    assert load(*[data] * 8) == [data] * 8
    with pytest.raises(ValueError, match=r"9 images have 80,200 pixels, this server takes 80,000 in a request, eight"):
        load(*[data] * 8, encoded())


def test_bytes_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(encoded() + bytes(1 << 20))
    data = file.read_bytes()
    for source in (data, data_url(data), str(file)):
        with pytest.raises(ValueError, match=r"more than 1,048,576 bytes, which .* \(--media-url-max-file-size-mb\)"):
            load(source, max_mb=1)
        assert load(source, max_mb=0) == [data]
    with pytest.raises(ValueError, match="is no regular file"):
        load("/dev/zero", max_mb=1)


def test_bytes_of_a_request_are_bounded_together() -> None:
    data = encoded() + bytes((1 << 20) - 1000)
    assert load(*[data] * 8, max_mb=1) == [data] * 8
    with pytest.raises(ValueError, match=r"the images of a request have more than 8,388,608 bytes, which this server"):
        load(*[data] * 9, max_mb=1)


def test_nothing_is_loaded_beyond_the_first_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data, loader = encoded(), ImageLoader(LIMITS)
    # The first refusal of a process takes longer.
    with pytest.raises(ValueError, match="an image cannot be read"):
        load(b"no image")
    read: list[object] = []
    original = loader._check

    def check(source: object, max_mb: int) -> tuple[object, int]:
        read.append(source)
        return original(source, max_mb)

    monkeypatch.setattr(loader, "_check", check)
    with pytest.raises(ValueError, match="an image cannot be read"):
        asyncio.run(loader.load([b"no image", *[data] * 499], None))
    assert len(read) < 250


def test_addresses_that_hang_keep_neither_the_loop_nor_other_images_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUEST_TIMEOUT", "1")
    loader, data = ImageLoader(LIMITS), encoded()
    delays_s: list[float] = []

    async def tick() -> None:
        while True:
            start_s = time.monotonic()
            await asyncio.sleep(0.01)
            delays_s.append(time.monotonic() - start_s)

    async def run(url: str) -> None:
        ticking = asyncio.create_task(tick())
        hanging = [asyncio.create_task(loader.load([url], None)) for _ in range(32)]
        await asyncio.sleep(0.1)
        assert await loader.load([data], None) == [data]
        assert not any(task.done() for task in hanging)
        for task in hanging:
            with pytest.raises(ValueError, match="an image cannot be read: 'http://127"):
                await task
        ticking.cancel()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        asyncio.run(run(f"http://127.0.0.1:{listening.getsockname()[1]}/image.png"))
    assert max(delays_s) < 0.25


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_that_refuses_everything_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} is at least 1, got"):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_a_cpu_has_lower_limits() -> None:
    assert default_limits("cuda", 2048 * 2048) == default_limits("cuda", None) == Limits()
    assert default_limits("cpu", 2048 * 2048).max_image_pixels == 2048 * 2048
    assert default_limits("cpu", None).max_image_pixels == 64_000_000
    assert default_limits("cpu", 2048 * 2048).max_video_pixels == 2048 * 2048
    assert default_limits("cpu", None).max_images == 64
    assert default_limits("cpu", None).max_selection_cost == 2e11
