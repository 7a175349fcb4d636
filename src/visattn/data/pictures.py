"""Pictures of files: found, decoded, kept in memory or read anew, cropped and mirrored."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from visattn.errors import UserError, require

__all__ = [
    "BILINEAR",
    "MEAN",
    "MEMORY",
    "STD",
    "SUFFIXES",
    "PictureSplit",
    "crop_and_side",
    "decode",
    "images_in",
    "open_picture",
    "orientation",
    "read_all",
    "room_for",
    "square",
    "survey",
    "unreadable",
    "upright",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
MEMORY = 2 * 1024**3  # decoded pictures are kept up to this many bytes; beyond it they are read anew in every epoch
BILINEAR = 2  # PIL's number of it
MARGIN = 8 / 7  # pictures are kept this much larger than the crop, the room in which the random crop moves
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ORIENTATION = 0x0112  # EXIF's number of it
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's number to PIL's of the transposition that undoes it
LEVELS = {2: 85, 4: 17}  # what PIL multiplies grey values of so few bits by

Read = Callable[[int], Tensor]
Item = TypeVar("Item")


def square(picture: Any, side: int, *, resample: int = BILINEAR) -> Tensor:
    """The central square of a PIL picture as (channels, side, side) uint8."""
    functional = require("torchvision.transforms.v2.functional", extra="compare", purpose="reading images")
    half = min(picture.size)
    left, top = (picture.width - half) // 2, (picture.height - half) // 2
    picture = picture.resize((side, side), resample=resample, box=(left, top, left + half, top + half))
    tensor: Tensor = functional.pil_to_tensor(picture)
    return tensor


def orientation(picture: Any) -> int:
    """How a PIL picture has to be turned to stand upright, as EXIF numbers it: 1 (not at all) to 8."""
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # what a camera or an editor wrote there can be broken in any way
        return 1
    return found if found in TURNS else 1


def upright(picture: Any, turn: int) -> Any:
    """A PIL picture turned as `orientation` says."""
    return picture.transpose(TURNS[turn]) if turn in TURNS else picture


def in_eight_bits(picture: Any) -> Any:
    """A PIL picture whose values are 0 to 255: PIL itself clips those of grey pictures with 16 bits to 255.

    Raises:
        ValueError: It has 32 bits, whose range nothing tells.
    """
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        raise ValueError("its pixels have 32 bits, and nothing tells which value is white; save it with 8 or 16")
    image = require("PIL.Image", extra="compare", purpose="reading images")
    grey = image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    grey.info = picture.info  # where EXIF is
    return grey


def decode(path: Path, *, numbers: bool = False, turn: bool = True) -> Any:
    """Decode one file to a PIL picture as it is seen: upright, with values from 0 to 255.

    Args:
        path: The file.
        numbers: Its values are numbers, of classes: leave them as they are in the file, and do not turn it.
        turn: False leaves a picture as it lies in the file.

    Raises:
        ValueError: It is no whole picture within the limits; the message says what is wrong.
    """
    picture, levels = _decoded(path)
    if numbers:
        return picture if levels == 1 else picture.point([value // levels for value in range(256)])
    picture = in_eight_bits(picture)
    return upright(picture, orientation(picture)) if turn else picture


def _decoded(path: Path) -> tuple[Any, int]:
    """The picture as PIL gives it, and what PIL multiplied its values by."""
    image = require("PIL.Image", extra="compare", purpose="reading images")
    try:
        with image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,}")
            form = str(picture.tile[0][3]) if picture.mode == "L" and picture.tile else ""
            picture.load()
            return picture, next((factor for bits, factor in LEVELS.items() if f"L;{bits}" in form), 1)
    except image.UnidentifiedImageError:
        raise ValueError("not an image") from None
    except (OSError, SyntaxError, EOFError, image.DecompressionBombError, image.DecompressionBombWarning) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def open_picture(path: Path, side: int) -> Tensor:
    """One file as (3, side, side) uint8.

    Raises:
        ValueError: As of `decode`.
    """
    return square(decode(path).convert("RGB"), side)


class PictureSplit:
    """Pictures behind a reading function, cropped and mirrored at random where they are trained on.

    Args:
        read: Index to (3, side, side) uint8, or (4, side, side) with the mask last, which so takes part in everything.
        count: How many pictures there are.
        labels: (N,) classes; None where the masks say the class of every pixel.
        crop: Side of the batches; the random crop moves in the margin between it and `side`.
        augment: Whether to crop and mirror at random instead of taking the centre.
        workers: Threads that read.
        kept: Pictures read already, in order; None reads them when they are asked for.
    """

    def __init__(
        self,
        read: Read,
        count: int,
        labels: Tensor | None,
        *,
        crop: int,
        augment: bool,
        workers: int,
        kept: Tensor | None = None,
    ) -> None:
        self.read, self.count, self.labels, self.kept = read, count, labels, kept
        self.crop, self.augment, self.workers = crop, augment, workers
        self._last: tuple[tuple[int, int, list[int]], Tensor] | None = None  # the targets follow their batch

    def __len__(self) -> int:
        return self.count

    def _pictures(self, indices: Tensor) -> Tensor:
        if self.kept is not None:
            return self.kept[indices]
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.stack(list(pool.map(self.read, indices.tolist())))

    def _crops(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """(B, 3 or 4, crop, crop) uint8, cropped and mirrored."""
        key = (seed, epoch, indices.tolist())
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        pictures = self._pictures(indices)
        room = pictures.shape[-1] - self.crop
        if self.augment:
            # every picture has a generator of its own, so that its crop does not depend on the batch it is in
            draws = [random.Random(f"{seed} {epoch} {index}") for index in indices.tolist()]
            moves = [(draw.randint(0, room), draw.randint(0, room), draw.random() < 0.5) for draw in draws]
        else:
            moves = [(room // 2, room // 2, False)] * len(indices)
        crops = []
        for picture, (top, left, mirrored) in zip(pictures, moves, strict=True):
            cut = picture[:, top : top + self.crop, left : left + self.crop]
            crops.append(cut.flip(-1) if mirrored else cut)
        self._last = (key, torch.stack(crops))
        return self._last[1]

    def batch(self, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
        """(B, 3, crop, crop) float32, normalised."""
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        return self._crops(indices, seed, epoch)[:, :3].to(torch.float32).div_(255).sub_(mean).div_(std)

    def targets(self, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
        """(B,) int64, or with masks (B, crop, crop)."""
        if self.labels is not None:
            return self.labels[indices]
        return self._crops(indices, seed, epoch)[:, 3].long()

    def pictures(self, indices: Tensor) -> Tensor:
        """(B, crop, crop, 3) uint8, the centre."""
        pictures = self._pictures(indices)[:, :3]
        start = (pictures.shape[-1] - self.crop) // 2
        return pictures[:, :, start : start + self.crop, start : start + self.crop].permute(0, 2, 3, 1)


def crop_and_side(sizes: Sequence[int], backbone_size: int, *, fixed: bool) -> tuple[int, int]:
    """Side of a batch: the backbone's own, or less where the pictures are smaller and the backbone takes any size."""
    typical = sorted(sizes)[len(sizes) // 2]
    crop = backbone_size if fixed else min(backbone_size, max(32, -(-typical // 32) * 32))
    return crop, round(crop * MARGIN)


def images_in(folder: Path) -> list[Path]:
    """Image files in a folder and the folders below it, by their ending."""
    found = (Path(base) / name for base, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def survey(files: Sequence[Path]) -> list[int]:
    """Shorter sides of some pictures, those that can be opened."""
    image = require("PIL.Image", extra="compare", purpose="reading images")
    step = max(1, len(files) // 200)
    sides = []
    for path in files[::step]:
        try:
            with image.open(path, formats=FORMATS) as picture:
                sides.append(min(picture.size))
        except (OSError, image.DecompressionBombError, image.DecompressionBombWarning):
            continue  # `read_all` names it
    return sides or [32]


def read_all(
    items: Sequence[Item], open_item: Callable[[Item], Tensor], *, kept: Tensor | None, workers: int
) -> tuple[list[Item], Tensor | None, list[tuple[Item, str]]]:
    """Decode everything once.

    Args:
        items: What to decode.
        open_item: Decodes one; a `ValueError` says what is wrong with it.
        kept: Where to put the pictures, a row for each item; None to let go of them.
        workers: Threads that read.

    Returns:
        Those that are whole, their rows if they are kept, and the others with the reason.
    """
    good: list[Item] = []
    bad: list[tuple[Item, str]] = []

    def attempt(item: Item) -> Tensor | str:
        try:
            return open_item(item)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), 256):
            some = items[start : start + 256]
            for item, found in zip(some, pool.map(attempt, some), strict=True):
                if isinstance(found, str):
                    bad.append((item, found))
                    continue
                if kept is not None:
                    kept[len(good)] = found
                good.append(item)
    return good, None if kept is None else kept[: len(good)], bad


def room_for(count: int, channels: int, side: int, *, of: int) -> Tensor | None:
    """Where `count` pictures of a data set are kept, None where all `of` it would not fit the memory set aside."""
    if of * channels * side**2 > MEMORY:
        return None
    return torch.empty(count, channels, side, side, dtype=torch.uint8)


def unreadable(folder: Path, bad: Sequence[tuple[Path, str]]) -> UserError:
    """What to say of files that are no whole pictures."""
    path, reason = bad[0]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return UserError(
        f"--data {folder}: unreadable image {path}{more}: {reason}. "
        "Mend or remove it, or add --skip-unreadable to go on without."
    )
