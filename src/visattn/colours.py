"""The colours of classes in masks, the same in reports and in predictions."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import numpy.typing as npt

from visattn.errors import require

__all__ = ["Colour", "hex_code", "indexed", "palette"]

Colour = tuple[int, int, int]


def palette(count: int) -> list[Colour]:
    """A colour for each class and 256 in all: class 0 dark, as it is mostly background, ignored pixels pale grey.

    Hues go around once; neighbours differ in lightness too, blues and violets, dark to the eye, stay light.

    Args:
        count: How many classes there are.
    """
    colours = [(38, 43, 51)]
    for index in range(count - 1):
        hue, lightness = index / (count - 1), (0.62, 0.42, 0.76)[index % 3]
        lightness = max(lightness, 0.65) if 0.6 < hue < 0.85 else lightness
        channels = colorsys.hls_to_rgb(hue, lightness, 0.75)
        colours.append((round(255 * channels[0]), round(255 * channels[1]), round(255 * channels[2])))
    return colours[:256] + [(225, 225, 225)] * (256 - len(colours))


def hex_code(colour: Colour) -> str:
    """A colour as style sheets write it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def indexed(mask: npt.NDArray[Any], classes: int) -> Any:
    """An (H, W) mask as a PIL picture whose values are the classes and whose palette is theirs."""
    image = require("PIL.Image", extra="compare", purpose="drawing masks")
    picture = image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    picture.putpalette([channel for colour in palette(classes) for channel in colour])
    return picture
