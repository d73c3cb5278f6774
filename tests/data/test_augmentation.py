import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates

from fedkl.data import AUGMENTATIONS, crop_flip, flip, resized_crop_flip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(40, 3, 12, 16, generator=generator(5))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shape_and_range_stay_and_the_input_too(name, images):
    before = images.clone()
    result = AUGMENTATIONS[name](images, generator())
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_the_generator_alone_decides(name, images):
    augment = AUGMENTATIONS[name]
    before = torch.get_rng_state()
    first, other = augment(images, generator(1)), augment(images, generator(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert torch.equal(first, augment(images, generator(1)))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_expanded_view_gives_what_its_copy_gives(name):
    gray = torch.rand(6, 1, 8, 8).expand(-1, 3, -1, -1)
    augment = AUGMENTATIONS[name]
    assert torch.equal(augment(gray, generator()), augment(gray.contiguous(), generator()))


def test_none_changes_and_draws_nothing(images):
    draws = generator()
    state = draws.get_state()
    assert AUGMENTATIONS["none"](images, draws) is images
    assert torch.equal(draws.get_state(), state)


def test_flip_mirrors_about_half_of_the_images(images):
    images = images.repeat(25, 1, 1, 1)
    result = flip(images, generator())
    mirrored = (result == images.flip(-1)).flatten(1).all(1)
    kept = (result == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~kept)
    assert 430 < int(mirrored.sum()) < 570


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_each_image_is_one_of_the_crops_of_its_padded_self(padding):
    images = torch.rand(150, 2, 6, 5, generator=generator(5))
    seen = set()
    for image, result in zip(images, crop_flip(images, generator(), padding=padding), strict=True):
        padded = F.pad(image, (padding,) * 4)
        matches = {
            (top, left, mirrored)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for mirrored in (False, True)
            if torch.equal(_mirrored(padded[:, top : top + 6, left : left + 5], mirrored), result)
        }
        assert matches
        seen |= matches
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(2 * padding + 1))
    assert {mirrored for *_, mirrored in seen} == {False, True}


def _mirrored(image, mirrored):
    return image.flip(-1) if mirrored else image


def test_a_crop_of_everything_is_the_image_or_its_mirror_image(images):
    result = resized_crop_flip(images, generator(), scale=(1.0, 1.0), ratio=(16 / 12, 16 / 12))
    for image, changed in zip(images, result, strict=True):
        assert any(torch.allclose(changed, _mirrored(image, m), atol=1e-5) for m in (False, True))


def test_crops_have_the_area_and_ratio_that_were_asked_for():
    # Of a picture of its own coordinates, the corners tell the rectangle.
    side = 64
    line = (torch.arange(side) + 0.5) / side
    picture = torch.stack((line.expand(side, side), line[:, None].expand(side, side)))
    result = resized_crop_flip(picture.expand(500, -1, -1, -1), generator())
    inner = (side - 3) / side  # the outermost pixels of an enlarged crop may be clamped
    width = (result[:, 0, 0, -2] - result[:, 0, 0, 1]).abs() / inner
    height = (result[:, 1, -2, 0] - result[:, 1, 1, 0]) / inner
    area, ratio = width * height, width / height
    assert float(area.min()) > 0.07
    assert float(area.max()) < 1.02
    assert 0.45 < float(area.mean()) < 0.56
    assert float(ratio.min()) > 0.73
    assert float(ratio.max()) < 1.37
    assert abs(float(ratio.log().mean())) < 0.03
    assert 200 < int((result[:, 0, 0, -2] < result[:, 0, 0, 1]).sum()) < 300


def test_every_pixel_is_the_bilinear_value_at_its_place():
    # Two channels carry the coordinates through the crop, so they tell where each pixel of the third is from.
    height, width = 20, 30
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    picture = torch.stack((y, x, torch.rand(height, width, generator=generator(3))))
    for y, x, values in resized_crop_flip(picture.expand(20, -1, -1, -1), generator()).numpy():
        expected = map_coordinates(picture[2].numpy(), (y * height, x * width), order=1, mode="nearest")
        np.testing.assert_allclose(values, expected, atol=1e-4)
