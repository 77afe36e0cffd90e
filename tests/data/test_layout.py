"""What is known of an image before it is read; the layouts are tested with their families."""

import numpy as np

from mllm_align.data.layout import Run, counts


class Lines:
    """A run of embeddings for each line of tiles, and a tile of 4 patches for every 10 x 10 pixels."""

    asked = 0

    def tiles(self, height, width, images):
        return (height // 10) * (width // 10), 4

    def runs(self, height, width, images, tile):
        Lines.asked += 1
        assert tile == 0
        return [Run(np.arange(width // 10 * 4)) for _ in range(height // 10)]


def test_counts_of_an_image():
    """3 x 2 tiles: 3 runs, each an image token in the text, of 2 x 4 embeddings; asked for once a size."""
    layout = Lines()
    assert counts(layout, 30, 20, 1) == (6, 3, 24)
    assert counts(layout, 30, 20, 1) == (6, 3, 24) and Lines.asked == 1
    assert counts(layout, 20, 30, 1) == (6, 2, 24)
