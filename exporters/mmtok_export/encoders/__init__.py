"""Exports a checkpoint's vision tower and projector as an ONNX model; each model family has a file."""

from mmtok_export.checkpoint_config import EncoderError
from mmtok_export.encoders.base import ExportedEncoder, ImageSize
from mmtok_export.encoders.export import (
    build_encoder,
    describe_encoder,
    export_encoder,
    native_image_size,
)

__all__ = [
    "EncoderError",
    "ExportedEncoder",
    "ImageSize",
    "build_encoder",
    "describe_encoder",
    "export_encoder",
    "native_image_size",
]
