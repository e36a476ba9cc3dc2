"""Training data of the pocket LLaVA-NeXT: scenes in tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from mmtok_bench.pocket.questions import Question
from mmtok_bench.pocket.scenes import Scene
from pocket_training.llava_next import CROPS, TILE_GRID, TILE_PX, in_reading_order
from pocket_training.training_data import IGNORED, PATCH_CHOICES, TrainingScenes, looks_of, patch_targets, pixels_of

__all__ = ["TrainingTiles"]

# A crop does not show on which side of the scene it is.
_SIDES = [PATCH_CHOICES.index(sides) for sides in (("top", "bottom"), ("left", "right"))]


class TrainingTiles(TrainingScenes):
    """Scenes by number, as `TrainingScenes` has them, for the tasks "tile patches" and "tile answers".

    Pixels are tiles [5, 3, 56, 56] uint8: the scene at half of its size, and its four crops. Targets and looks are
    those of the 259 tokens that the language model reads; a newline has none.
    """

    def pixels(self, scene: Scene, grid: int) -> Tensor:
        """Returns the tiles of a scene."""
        return self.cut(pixels_of(scene))

    def cut(self, whole: Tensor) -> Tensor:
        """Returns the tiles of an image [3, 112, 112], as Hugging Face's processor cuts them."""
        crops = [crop for rows in whole.chunk(CROPS, dim=1) for crop in rows.chunk(CROPS, dim=2)]
        return torch.stack([resize(whole, [TILE_PX, TILE_PX], InterpolationMode.BICUBIC), *crops])

    def targets(self, scene: Scene, grid: int) -> Tensor:
        """Returns [259, choices]; `IGNORED` for a newline, and for the side of the scene that a crop's patch is on."""
        joined = patch_targets(scene, grid)
        joined[:, _SIDES] = IGNORED
        return in_reading_order(patch_targets(scene, TILE_GRID), joined, torch.full((len(PATCH_CHOICES),), IGNORED))

    def looks(self, scene: Scene, questions: Sequence[Question], grid: int) -> Tensor:
        """Returns [2, 12, 259]: what is asked for is looked for in the base tile and in the crops."""
        base, joined = (looks_of(scene, questions, size)[..., None] for size in (TILE_GRID, grid))
        return in_reading_order(base, joined, torch.zeros(1))[..., 0]
