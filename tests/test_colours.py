import numpy as np
import pytest

from visattn.colours import hex_code, indexed, palette


@pytest.mark.parametrize("count", [1, 2, 11, 21, 150, 256])
def test_palette_has_a_colour_of_its_own_for_every_class(count):
    colours = palette(count)
    assert len(colours) == 256
    assert len(set(colours[:count])) == count
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


def test_a_mask_is_a_picture_of_its_classes():
    mask = np.array([[0, 1, 2], [255, 2, 1]])
    picture = indexed(mask, 3)
    assert (picture.mode, picture.size) == ("P", (3, 2))
    assert np.array_equal(np.asarray(picture), mask)
    assert picture.convert("RGB").getpixel((1, 0)) == palette(3)[1]
    assert hex_code(palette(3)[0]) == "#262b33"
