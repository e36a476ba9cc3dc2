"""A new tokenizer process decodes an image before a request asks for it."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from sglang.srt.utils import load_image as sglangs_load_image

from mmtok_sglang.families import qwen


def test_a_jpeg_is_decoded_as_those_of_requests_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoded: list[Any] = []

    def load_image(data: bytes, mode: Any) -> Any:
        decoded.append((Image.open(BytesIO(data)).format, mode))
        return sglangs_load_image(data, mode)

    monkeypatch.setattr(qwen, "load_image", load_image)
    qwen._decode_first(True)
    assert decoded == [("JPEG", True)]
    assert not caplog.messages


def test_a_decoder_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def load_image(data: bytes, mode: Any) -> Any:
        raise RuntimeError("no decoder")

    monkeypatch.setattr(qwen, "load_image", load_image)
    qwen._decode_first(True)
    assert caplog.messages == ["MMTok: a first image could not be decoded (RuntimeError: no decoder)"]
