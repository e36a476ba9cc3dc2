import pytest
import torch

from mmtok_deploy.padding import padding_mask

SIZES = [(1, 1), (1, 1000), (1000, 1), (336, 336), (400, 600), (600, 400), (337, 336), (35, 1000), (640, 427), (3, 7)]


@pytest.mark.parametrize(("side", "patches"), [(336, 24), (224, 16), (28, 2)])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_padding_is_the_patches_without_a_pixel_of_the_image(height: int, width: int, side: int, patches: int) -> None:
    longest = max(height, width)
    rows, columns = (round(length * (side / longest)) for length in (height, width))
    top, left = (side - rows) // 2, (side - columns) // 2
    has_image = torch.zeros(side, side, dtype=torch.bool)
    has_image[top : top + rows, left : left + columns] = True
    patch = side // patches
    expected = ~has_image.reshape(patches, patch, patches, patch).any(dim=3).any(dim=1)
    assert torch.equal(padding_mask(height, width, side, patches).reshape(patches, patches), expected)


@pytest.mark.parametrize(("height", "width", "num_excluded"), [(336, 336, 0), (400, 600, 8 * 24), (1, 1000, 576)])
def test_padding_of_known_sizes(height: int, width: int, num_excluded: int) -> None:
    assert int(padding_mask(height, width, 336, 24).sum()) == num_excluded
    transposed = padding_mask(width, height, 336, 24).reshape(24, 24).T.flatten()
    assert torch.equal(padding_mask(height, width, 336, 24), transposed)
