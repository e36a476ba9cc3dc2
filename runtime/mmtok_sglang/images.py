"""Loading a request's images off the event loop, within limits that are checked before anything is decoded."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import Any
from urllib.parse import unquote, urlparse

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from sglang.srt.utils import CLIENT_MEDIA_EXCEPTIONS, ImageData, get_image_bytes, load_image

from mmtok_sglang.downloads import Downloads
from mmtok_sglang.limits import Limits
from mmtok_sglang.refusals import refusal
from mmtok_sglang.stages import image_stage

__all__ = ["ImageLoader", "check_num_bytes", "decoded", "is_raw"]

# Threads that wait for other servers, apart from those that read: addresses that hang delay no other image but one
# that has an address, too.
_NUM_DOWNLOADS = 64
_NUM_READERS = 4
# SGLang's own time limit holds between two packets; this one for the whole of a download.
_DOWNLOAD_TIMEOUT_S = 30.0
_DEFAULT_MAX_FILE_MB = 64
# Bytes that the files of one request may have together, in multiples of what one may have; and how many of them are
# read at a time, which may be downloads that turn out too large.
_MAX_FILES = 8
_NUM_AT_A_TIME = 8
# Formats whose header says what decoding takes. Of Pillow's others some hold a file of another size (ICO, ICNS, IPTC),
# which ICO decodes as it is opened, unpack without an end (FITS), or run another program (EPS). Some have encodings
# that Python decodes (`Image.DECODERS`): one megapixel took 7 s, in which threads for other requests wait.
_FORMATS = ["AVIF", "BMP", "DDS", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF"]
_FORMATS += ["WEBP"]
_ICONS = (b"\0\0\1\0", b"\0\0\2\0")
# Each scan of a progressive JPEG goes over all pixels, and may take a few bytes. Those of encoders are about ten;
# libtiff, too, gives up after 100.
_MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
_MAX_HEADER_CALLS = 1 << 16
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def is_raw(image: Any) -> bool:
    """True for what SGLang loads as an image; False for features and embeddings that come ready-made."""
    return isinstance(image, str | bytes | Image.Image | ImageData)


class ImageLoader:
    """Reads images and checks their size from the header; one a tokenizer process.

    Args:
        limits: What an image is refused for.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._downloads = Downloads(_NUM_DOWNLOADS, _DOWNLOAD_TIMEOUT_S)
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="mmtok-image")

    async def load(self, images: Sequence[Any], server_args: Any) -> list[Any]:
        """Returns the images for SGLang's processor, in their order, encoded as they came.

        Args:
            images: What SGLang can load; what is no raw image is returned as it is.
            server_args: SGLang's, whose `media_url_max_file_size_mb` bounds files and encoded images, too.

        Raises:
            ValueError: An image that cannot be read, or is beyond a limit (HTTP 400).
        """
        max_mb = getattr(server_args, "media_url_max_file_size_mb", _DEFAULT_MAX_FILE_MB)
        at_a_time = asyncio.Semaphore(_NUM_AT_A_TIME)
        sizes_bytes: list[int] = []
        nums_pixels: list[int] = []

        async def load_one(image: Any) -> Any:
            async with at_a_time:
                loaded, num_bytes, num_pixels = await self._load(image, max_mb)
            # At once: what is beyond the limits is not loaded any more.
            sizes_bytes.append(num_bytes)
            nums_pixels.append(num_pixels)
            check_num_bytes(sum(sizes_bytes), server_args, "the images of a request have")
            self._limits.check_images(nums_pixels)
            return loaded

        tasks = [asyncio.create_task(load_one(image)) for image in images]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _load(self, image: Any, max_mb: int) -> tuple[Any, int, int]:
        """Returns an image, the bytes that it is held in, and its number of pixels."""
        if not is_raw(image):
            return image, 0, 0
        source = await self._download(image.url if isinstance(image, ImageData) else image, max_mb)
        loop = asyncio.get_running_loop()
        loaded, num_pixels = await loop.run_in_executor(self._readers, self._check, source, max_mb)
        num_bytes = len(loaded) if isinstance(loaded, bytes) else 0
        return replace(image, url=loaded) if isinstance(image, ImageData) else loaded, num_bytes, num_pixels

    async def read(self, source: str | bytes, server_args: Any, what: str) -> bytes:
        """Returns the bytes of a file of another kind, as it came, under the same bounds.

        Args:
            source: An address, a path, base64 text or the bytes.
            server_args: As for `load`.
            what: How errors call it: "a video".

        Raises:
            ValueError: It cannot be read, or is too large (HTTP 400).
        """
        max_mb = getattr(server_args, "media_url_max_file_size_mb", _DEFAULT_MAX_FILE_MB)
        source = await self._download(source, max_mb, what)
        return await asyncio.get_running_loop().run_in_executor(self._readers, _read, source, max_mb, what)

    async def _download(self, source: Any, max_mb: int, what: str = "an image") -> Any:
        """Returns the bytes at an address; what is none is returned as it is."""
        if not (isinstance(source, str) and source.startswith(("http://", "https://"))):
            return source
        try:
            return await self._downloads.run(_read, source, max_mb, what)
        except TimeoutError:
            raise refusal(
                "image", f"{what} was not downloaded within {_DOWNLOAD_TIMEOUT_S:g} s: {source!s:.100}"
            ) from None

    def _check(self, source: Any, max_mb: int) -> tuple[Any, int]:
        if isinstance(source, Image.Image):
            width, height = source.size
        else:
            with image_stage("decode"):
                source = _read(source, max_mb)
                width, height = _size_in_header(source, self._limits)
        self._limits.check_image(width, height)
        return source, width * height


def _read(source: str | bytes, max_mb: int, what: str = "an image") -> bytes:
    """Returns an encoded image's bytes, as SGLang's `load_image` finds them."""
    most = _max_bytes(max_mb)
    is_address = isinstance(source, str) and source.startswith(("http://", "https://"))
    # Base64 has 4 letters for 3 bytes.
    if isinstance(source, str) and not is_address and len(source) // 4 * 3 > most + 3:
        raise _too_many_bytes(most, f"{what} has")
    try:
        data = source if isinstance(source, bytes) else _bytes_of(source, most)
    except (*CLIENT_MEDIA_EXCEPTIONS, OSError) as error:
        if is_address and "download limit" in str(error):
            raise _too_many_bytes(most, f"{what} has") from None
        raise refusal("image", f"{what} cannot be read: {source[:100]!r}: {error!s:.300}") from error
    if len(data) > most:
        raise _too_many_bytes(most, f"{what} has")
    return data


def _bytes_of(source: str, most: int) -> bytes:
    if source.startswith("file://"):
        return _read_file(unquote(urlparse(source).path), most)
    if source.startswith("/"):
        return _read_file(source, most)
    data: bytes = get_image_bytes(source)
    return data


def _read_file(path: str, most: int) -> bytes:
    status = os.stat(path)
    # A device or a pipe has no end.
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is no regular file")
    with open(path, "rb") as file:
        return file.read(min(most, status.st_size) + 1)


def check_num_bytes(num_bytes: int, server_args: Any, what: str) -> None:
    """Raises ValueError (HTTP 400) for files that are too large together.

    Args:
        num_bytes: Bytes of those that are loaded by now.
        server_args: As for `ImageLoader.load`.
        what: How the error calls them: "the images of a request have".
    """
    most = _MAX_FILES * _max_bytes(getattr(server_args, "media_url_max_file_size_mb", _DEFAULT_MAX_FILE_MB))
    if num_bytes > most:
        raise _too_many_bytes(most, what)


def _max_bytes(max_mb: int) -> int:
    return max_mb << 20 if max_mb else sys.maxsize  # 0 is SGLang's word for no limit


def _too_many_bytes(most: int, what: str) -> ValueError:
    return refusal(
        "image",
        f"{what} more than {most:,} bytes, which this server takes (--media-url-max-file-size-mb): send smaller files",
    )


class _Header(BytesIO):
    """The bytes of an image whose header is read.

    Headers take some hundred calls. One of millions of segments, or a text that some of Pillow's formats read byte by
    byte, takes minutes of a thread that other images wait for.
    """

    _num_calls = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().readline(size)

    def _count(self) -> None:
        self._num_calls += 1
        if self._num_calls > _MAX_HEADER_CALLS:
            raise OSError("its header is in too many parts")


def _size_in_header(data: bytes, limits: Limits) -> tuple[int, int]:
    """Returns width and height; nothing is decoded."""
    # An uncompressed TGA begins as a file of no cursors does.
    if data.startswith(_ICONS) and data[4:6] != b"\0\0":
        raise _format_refusal("ICO")
    try:
        with Image.open(_Header(data)) as image:
            name, size = image.format or "", image.size
            tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
            tile = int(tags.get(_TILE_WIDTH, 1)), int(tags.get(_TILE_LENGTH, 1))
            decoders = [each[0] for each in image.tile]
    except Image.DecompressionBombError as error:
        raise refusal("pixels", f"an image is too large to be read: {error}") from error
    except UnidentifiedImageError as error:
        raise refusal("image", "an image cannot be read: its bytes are of no format that Pillow knows") from error
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise refusal("image", f"an image cannot be read: {error!s:.300}") from error
    if name not in _FORMATS:
        raise _format_refusal(name)
    in_python = [decoder for decoder in decoders if decoder in Image.DECODERS]
    if in_python:
        raise refusal(
            "image",
            f"an image is of an encoding of {name} that is decoded byte by byte ({in_python[0]}), which takes minutes: "
            "send it as PNG or JPEG",
        )
    if name in ("JPEG", "MPO") and data.count(_START_OF_SCAN) > _MAX_SCANS:
        raise refusal(
            "image",
            f"an image is a JPEG of {data.count(_START_OF_SCAN):,} scans, this server takes {_MAX_SCANS}: send it as a "
            "usual JPEG or PNG",
        )
    if tile[0] * tile[1] > limits.max_image_pixels:
        # A tile is decoded whole, however little of it is in the image.
        limits.check_image(*tile)
    return size


def _format_refusal(name: str) -> ValueError:
    return refusal(
        "image", f"an image is of the format {name}, this server takes {', '.join(_FORMATS)}: send it as PNG or JPEG"
    )


def decoded(source: Any) -> Any:
    """Returns an image that `load` gave as RGB, as SGLang's Transformers processor makes it; no raw image as it is.

    On the host: that processor fails on what a GPU decodes.

    Raises:
        ValueError: It cannot be decoded (HTTP 400).
    """
    if not is_raw(source):
        return source
    try:
        with image_stage("decode"):
            image, _ = load_image(source, False)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise refusal("image", f"an image cannot be decoded: {error!s:.300}") from error
