import random

import pytest
from PIL import Image


def _paint(path, classes=("left", "right"), count=10):
    """Squares in the left or the right half of small noisy images."""
    for side, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(count):
            draw = random.Random(f"{name} {i}")
            image = Image.new("RGB", (40, 40), (draw.randrange(60), draw.randrange(60), draw.randrange(60)))
            image.paste((250, 250, 250), (20 * (side % 2) + draw.randrange(8), draw.randrange(28), 26, 38))
            image.save(path / name / f"{i}.png")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return _paint(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def paint_folder():
    """A function that makes a folder of class folders."""
    return _paint
