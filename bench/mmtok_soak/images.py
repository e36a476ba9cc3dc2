"""Images that are truncated, have a wrong size in the header, expand to gigabytes, or have unusual modes."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from mmtok_bench.client import in_parallel
from mmtok_bench.server import SglangServer
from mmtok_deploy.photographs import photograph
from mmtok_soak.fixed_chats import chat_body
from mmtok_soak.trial import Trial, resident_bytes

__all__ = ["icon_of", "jpeg_of_scans", "odd_images", "send_odd_images", "tiff_of_one_tile"]

_TIMEOUT_S = 60.0
_PARALLEL = 4
_MAX_GROWTH_BYTES = 2 << 30
_SETTINGS: tuple[Mapping[str, object], ...] = (
    *({}, {"mmtok_budget": "all"}, {"mmtok_budget": "auto"}),
    {"mmtok_method": "downsample"},
)


def send_odd_images(
    trial: Trial,
    server: SglangServer,
    num_cut: int,
    *,
    settings: Sequence[Mapping[str, object]] = _SETTINGS,
    with_large: bool = True,
) -> None:
    """Sends each image with each setting; it must be answered by 2xx or 4xx, with at most 2 GB more memory.

    Args:
        trial: Counts and reports.
        server: The server that they are sent to.
        num_cut: Number of files that are truncated or changed at a random place.
        settings: MMTok's fields of the requests.
        with_large: Whether images that would expand to gigabytes are sent, too.
    """
    images = [*odd_images(), *_cut(trial, num_cut), *(_large() if with_large else ())]
    cases = [(name, data, fields) for name, data in images for fields in settings]

    def one(case: tuple[str, bytes, Mapping[str, object]]) -> None:
        name, data, fields = case
        if trial.is_over() or not server.is_alive():
            return
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        trial.count("images")
        body = chat_body([url], "What is it?", dict(fields))
        reply = trial.send(server, "/v1/chat/completions", body, timeout_s=_TIMEOUT_S)
        # SGLang answers an image that it cannot decode by 400.
        what = f"seed {trial.seed} image {name} {fields} -> {reply.status} {reply.text[:300]}"
        if reply.status == 0:
            trial.fail(f"an image was not answered: {name.partition(' at ')[0]}", what)
        elif reply.status >= 500:
            trial.fail(f"an image was answered by 5xx: {name.partition(' at ')[0]}", what)

    in_parallel(_PARALLEL, one, [case for case in cases if not case[0].startswith("large")])
    for case in cases:
        if not case[0].startswith("large"):
            continue
        trial.step(case[0])
        before_bytes = resident_bytes(server)
        # Alone, so that the growth of memory is its own.
        one(case)
        grown_bytes = resident_bytes(server) - before_bytes
        if grown_bytes > _MAX_GROWTH_BYTES:
            trial.fail(f"memory grew by over 2 GB: {case[0]}", f"{grown_bytes / 2**30:.1f} GB, {case[2]}")


def odd_images() -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of image files of unusual modes and sizes."""
    picture = photograph("coffee").resize((96, 64))
    for mode, file_format in (
        *(("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG")),
        *(("CMYK", "JPEG"), ("L", "JPEG"), ("YCbCr", "JPEG"), ("I", "TIFF"), ("F", "TIFF"), ("LAB", "TIFF")),
        *(("RGB", "GIF"), ("RGB", "WEBP"), ("RGB", "BMP"), ("RGBA", "WEBP"), ("RGB", "ICO"), ("RGB", "PPM")),
    ):
        yield f"mode {mode} {file_format}", _file(_converted(picture, mode), file_format)
    palette = picture.convert("P")
    yield "palette with transparency", _file(palette, "PNG", transparency=3)
    yield "animated GIF", _file(picture, "GIF", save_all=True, append_images=[palette.convert("RGB")] * 3)
    exif = Image.Exif()
    exif[274] = 6
    yield "turned by EXIF", _file(picture, "JPEG", exif=exif)
    for width, height in ((1, 1), (1, 300), (300, 1), (2, 200)):
        yield f"{width} x {height}", _file(Image.new("RGB", (width, height), "red"), "PNG")
    yield "empty", b""
    yield "text", b"hello"
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "HTML", b"<html><body>404</body></html>"
    yield "PNG of 0 x 0", _png(0, 0, b"")
    yield "PNG without pixels", _png(64, 64, b"")
    yield "PNG of wrong length", _png(64, 64, bytes(100))


def _large() -> Iterator[tuple[str, bytes]]:
    yield "large 1 x 60,000", _file(Image.new("RGB", (1, 60_000), "red"), "PNG")
    yield "large 60,000 x 1", _file(Image.new("RGB", (60_000, 1), "red"), "PNG")
    yield "large 30,000 x 30,000 of one bit", _png(30_000, 30_000, bytes((30_000 // 8 + 1) * 30_000), depth=1)
    yield "large 13,000 x 13,000 GIF", _gif_header(13_000, 13_000)
    yield "large 65,535 x 65,535 in the header", _png(65_535, 65_535, b"")
    yield "large 13,000 x 13,000 in an icon of 16 x 16", icon_of(_png(13_000, 13_000, bytes(1626 * 13_000), depth=1))
    yield "large JPEG of 20,000 scans", jpeg_of_scans(20_000, side=1500)
    yield "large tile of 40,000 x 40,000 in a TIFF of 16 x 16", tiff_of_one_tile(40_000)


def icon_of(inner: bytes) -> bytes:
    """Returns an icon file that contains the PNG `inner`, with a size of 16 x 16 in its directory."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


def jpeg_of_scans(count: int, side: int = 90) -> bytes:
    """Returns a grey progressive JPEG of `count` scans: its last one, of a few bytes, is repeated."""
    data = _file(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * (count - data.count(b"\xff\xda")) + data[end:]


def tiff_of_one_tile(side: int) -> bytes:
    """Returns a TIFF of 16 x 16 pixels, which are the corner of one tile of `side` x `side`."""
    compressor = zlib.compressobj(9)
    pixels = b"".join(compressor.compress(bytes(side)) for _ in range(side)) + compressor.flush()
    values = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(pixels)}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(values)) + tags + bytes(4)


def _cut(trial: Trial, count: int) -> Iterator[tuple[str, bytes]]:
    draw = trial.random("images")
    picture = photograph("coffee").resize((96, 64))
    whole = {name: _file(picture, name) for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    for number in range(count):
        name = draw.choice(list(whole))
        data = bytearray(whole[name])
        place = draw.randrange(len(data))
        if number % 2:
            del data[place:]
            yield f"truncated {name} at {place}", bytes(data)
        else:
            data[place] ^= 1 << draw.randrange(8)
            yield f"changed {name} at {place}", bytes(data)


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray((np.asarray(picture.convert("L")).astype(np.uint16)) * 257)
    if mode == "LAB":
        return Image.new("LAB", picture.size, (128, 20, 20))
    if mode == "RGBA":
        picture = picture.copy()
        picture.putalpha(picture.convert("L"))
        return picture
    return picture.convert(mode)


def _file(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _png(width: int, height: int, rows: bytes, *, depth: int = 8) -> bytes:
    """Returns a grey PNG with this size in its header and these bytes as its rows, which need not fit."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def _gif_header(width: int, height: int) -> bytes:
    data = bytearray(_file(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)
