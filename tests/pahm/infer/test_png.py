import numpy as np
import pytest
from PIL import Image

from pahm.infer.png import write_png


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (224, 100)])
def test_a_file_holds_the_image(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    write_png(Image.fromarray(pixels), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as found:
        assert (found.format, found.mode, found.size) == ("PNG", "RGB", size)
        found.verify()  # the checksums
    with Image.open(tmp_path / "a.png") as found:
        assert np.array_equal(found, pixels)


def test_a_photograph_takes_no_more_space_than_pillows_fastest(tmp_path):
    ramp = np.linspace(0, 255, 200)
    noise = np.random.default_rng(0).normal(0, 4, (200, 200, 3))
    pixels = (ramp[:, None, None] + noise).clip(0, 255).astype(np.uint8)
    write_png(Image.fromarray(pixels), tmp_path / "ours.png")
    Image.fromarray(pixels).save(tmp_path / "pillow.png", compress_level=1)
    assert (tmp_path / "ours.png").stat().st_size < 1.1 * (tmp_path / "pillow.png").stat().st_size
