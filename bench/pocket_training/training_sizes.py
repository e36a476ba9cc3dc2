"""Training data of a pocket Qwen2.5-VL that sees scenes at three sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmtok_bench.pocket import PICTURE_PX
from mmtok_bench.pocket.questions import picture_of
from mmtok_bench.pocket.scenes import Scene
from pocket_training.model import GRID, PATCH_PX
from pocket_training.qwen import SERVED_PATCH_PX, undo_enlarging
from pocket_training.training_data import Task, TrainingScenes

__all__ = ["GRIDS", "TrainingSizes"]

GRIDS = (GRID, 10, 7)
"""Image tokens in a row: of a whole scene, and at the encoder scales 0.75 and 0.5."""

_UNDO = undo_enlarging()


class TrainingSizes(TrainingScenes):
    """Scenes by number, as `TrainingScenes` has them, with all scenes of a batch at one of three sizes.

    Args:
        task: "size patches" or "size answers".
        seed: Seed of all scenes.
        tokenizer: Tokenizer of the model.
        asked: `PocketModel.asked`.
        batch_size: Scenes in a batch.
    """

    def __init__(self, task: Task, seed: int, tokenizer: Any, asked: str, batch_size: int) -> None:
        super().__init__(task, seed, tokenizer, asked)
        self._batch_size = batch_size

    def grid(self, index: int) -> int:
        """Returns the number of image tokens in a row and in a column of a scene."""
        return GRIDS[index // self._batch_size % len(GRIDS)]

    def pixels(self, scene: Scene, grid: int) -> Tensor:
        """Returns [3, 8 * grid, 8 * grid] float32: the patches of 4 px that a served model's of 14 px stand for."""
        picture = picture_of(scene, PICTURE_PX["qwen2.5-vl"])
        num_patches = grid * PATCH_PX // len(_UNDO)
        side = num_patches * SERVED_PATCH_PX
        if side != picture.width:
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        patches = (
            torch.from_numpy(np.array(picture))
            .float()
            .reshape(num_patches, SERVED_PATCH_PX, num_patches, SERVED_PATCH_PX, 3)
        )
        pixels = torch.einsum("RyCxc,hy,wx->cRhCw", patches, _UNDO, _UNDO)
        return pixels.reshape(3, grid * PATCH_PX, grid * PATCH_PX)
