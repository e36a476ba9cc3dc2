"""The pictures of the page: built-in scenes and photographs, and pictures that the user drops on it."""

from __future__ import annotations

import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from mmtok_bench.pocket.questions import make_scenes, picture_of, render
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_deploy.photographs import PHOTOGRAPHS, photograph

__all__ = ["MAX_UPLOAD_BYTES", "Picture", "PictureError", "Pictures"]

MAX_UPLOAD_BYTES = 64 << 20
"""SGLang's limit of a file's size (--media-url-max-file-size-mb)."""
# A server's defaults (--mmtok-max-image-pixels, --mmtok-max-aspect-ratio); importing them would import SGLang.
_MAX_PIXELS = 64_000_000
_MAX_ASPECT_RATIO = 200

# The scenes of the page; the model was not trained on them.
_SCENE_SEED, _NUM_SCENES = 107, 4
_NUM_QUESTIONS = 8
_SCENE_SCALE = 6
# Only these: some of Pillow's formats run other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MAX_UPLOADS = 16
_MAX_SIDE_PX = 2048


class PictureError(ValueError):
    """A picture does not exist (any more), or cannot be read."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture of the page.

    Args:
        name: Its name on the page.
        sent: The image that is sent to the model.
        shown: The image that is shown; a scene is drawn larger.
        questions: Questions and their right answers, if known.
        note: How it was changed before it is sent; empty if it was not.
    """

    name: str
    sent: Image.Image
    shown: Image.Image
    questions: tuple[tuple[str, str], ...] = ()
    note: str = ""


class Pictures:
    """Pictures by id: the built-in ones, and the newest dropped ones.

    Args:
        scene_px: Side of the scenes as they are sent.
    """

    def __init__(self, scene_px: int = SCENE_PX) -> None:
        self._built_in: dict[str, Picture] = {}
        for number, asked in enumerate(make_scenes(_SCENE_SEED, _NUM_QUESTIONS)[:_NUM_SCENES], start=1):
            sent, shown = picture_of(asked.scene, scene_px), render(asked.scene, _SCENE_SCALE)
            questions = tuple((question.text, question.answer) for question in asked.questions)
            self._built_in[f"scene-{number}"] = Picture(f"Scene {number}", sent, shown, questions)
        for name in PHOTOGRAPHS:
            image = photograph(name)
            self._built_in[name] = Picture(name.capitalize(), image, image)
        self._uploads: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def built_in(self) -> Iterator[tuple[str, Picture]]:
        """Yields the built-in pictures with their ids."""
        yield from self._built_in.items()

    def get(self, picture_id: str) -> Picture:
        """Returns a picture.

        Raises:
            PictureError: There is no picture of that id, or it is no longer held.
        """
        with self._lock:
            picture = self._built_in.get(picture_id) or self._uploads.get(picture_id)
        if picture is None:
            raise PictureError(
                "This picture is gone: a dropped picture is held in memory alone, until mmtok demo --page ends or "
                f"{_MAX_UPLOADS} newer ones have come. Drop it again."
            )
        return picture

    def add(self, data: bytes) -> tuple[str, Picture]:
        """Stores a dropped picture and returns its id and the picture; the oldest one is removed if there are too many.

        Raises:
            PictureError: The picture cannot be read, or is larger than a server accepts.
        """
        picture = _read(data)
        # Random, so that another site's page cannot guess it.
        picture_id = f"dropped-{secrets.token_urlsafe(12)}"
        with self._lock:
            self._uploads[picture_id] = picture
            while len(self._uploads) > _MAX_UPLOADS:
                self._uploads.popitem(last=False)
        return picture_id, picture


def _read(data: bytes) -> Picture:
    if len(data) > MAX_UPLOAD_BYTES:
        raise PictureError(f"The file has {len(data):,} bytes, and at most {MAX_UPLOAD_BYTES:,} are taken.")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            # The size is in the header: nothing is decoded before it is checked.
            _check_size(*image.size)
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise PictureError(f"The file is no picture that can be read: expected one of {', '.join(_FORMATS)}.") from None
    except PictureError:
        raise
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise PictureError(f"The picture cannot be read: {error!s:.300}.") from error
    size = upright.size
    upright.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    note = "" if upright.size == size else f"made smaller from {size[0]} x {size[1]} pixels"
    return Picture("Dropped picture", upright, upright, note=note)


def _check_size(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise PictureError(f"The picture has {width} x {height} pixels, and at most {_MAX_PIXELS:,} are taken.")
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise PictureError(
            f"The picture has {width} x {height} pixels: one side may be at most {_MAX_ASPECT_RATIO} times the other."
        )
