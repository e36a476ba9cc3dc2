"""Exports a checkpoint's vision tower and projector as an ONNX model; each model family has a file."""

from mmtok_export.encoders.base import EncoderError, ExportedEncoder, ImageSize
from mmtok_export.encoders.export import (
    FAMILIES,
    build_encoder,
    describe_encoder,
    export_encoder,
    family_of,
    native_image_size,
)

__all__ = [
    "FAMILIES",
    "EncoderError",
    "ExportedEncoder",
    "ImageSize",
    "build_encoder",
    "describe_encoder",
    "export_encoder",
    "family_of",
    "native_image_size",
]
