"""Crops: a part of the image and nothing else, of the area and ratio that are said, drawn by a key."""

import numpy as np
import pytest
from PIL import Image

from mllm_align.data.distortion import CROP_RATIO, CROP_SCALE, cropped, numbers

WIDTH, HEIGHT = 160, 100


def ramp() -> Image.Image:
    """Red tells the column, green the line."""
    red = np.broadcast_to(np.arange(WIDTH) * 255 / (WIDTH - 1), (HEIGHT, WIDTH))
    green = np.broadcast_to((np.arange(HEIGHT) * 255 / (HEIGHT - 1))[:, None], (HEIGHT, WIDTH))
    return Image.fromarray(np.stack([red, green, red * 0], -1).round().astype(np.uint8))


def test_a_crop_is_a_small_part_scaled_to_the_whole():
    """Over many draws, the parts' areas and ratios fill their ranges, and their places the image."""
    image, parts = ramp(), []
    for number in range(200):
        made = cropped(image, numbers(0, "a", number))
        assert made.size == image.size and made.mode == "RGB"
        seen = np.asarray(made, np.float64)[..., :2] / 255
        assert (np.diff(seen[..., 0], axis=1) >= 0).all() and (np.diff(seen[..., 1], axis=0) >= 0).all()
        parts.append((*seen.min((0, 1)), *seen.max((0, 1))))
    left, top, right, bottom = np.array(parts).T
    width, height = right - left, bottom - top
    area, ratio = width * height, width / height
    assert 0.001 < area.min() < 0.02 and 0.17 < area.max() < CROP_SCALE[1] + 0.005
    assert CROP_RATIO[0] - 0.1 < ratio.min() < 0.8 and 1.25 < ratio.max() < CROP_RATIO[1] + 0.15
    assert left.min() < 0.02 and top.min() < 0.02 and right.max() > 0.98 and bottom.max() > 0.98
    assert area.mean() == pytest.approx(np.mean(CROP_SCALE), abs=0.015)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 500), (500, 1)])
def test_the_smallest_images_have_crops(size):
    for number in range(20):
        assert cropped(Image.new("RGB", size, "red"), numbers(0, "a", number)).getpixel((0, 0)) == (
            255,
            0,
            0,
        )


def test_numbers_follow_from_seed_record_and_pass():
    def first(*key):
        return numbers(*key).random()

    assert first(1, "a", 2) == first(1, "a", 2)
    assert (
        len({first(*key) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a0", 0))})
        == 5
    )
