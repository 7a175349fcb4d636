"""Pictures with a class for every pixel: `images/` and `masks/`, paired by name."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visattn.data.base import Dataset
from visattn.data.pictures import (
    MEAN,
    STD,
    PictureSplit,
    crop_and_side,
    decode,
    images_in,
    orientation,
    read_all,
    room_for,
    square,
    survey,
    unreadable,
    upright,
)
from visattn.errors import UserError, require
from visattn.tasks import IGNORED, SEGMENTATION

__all__ = ["from_masks"]

LOSSLESS = (".png", ".bmp", ".gif", ".tif", ".tiff")  # what class numbers survive in
NEAREST = 0  # PIL's number of it: a class is never between two others
NAMES = "classes.txt"

Pair = tuple[Path, Path]


def from_masks(
    folder: Path, *, backbone_size: int, fixed_size: bool, skip_unreadable: bool = False, seed: int = 0
) -> Dataset:
    """Open `images/` and `masks/`, alone and then split by the seed, or both in `train/` and in `val/`.

    A mask has the name of its image and is an indexed or grey picture whose values are the classes, 255 where a pixel
    is to be ignored. `classes.txt` may name the classes, one on a line; without it they are numbers up to the largest
    in the masks. Every file is decoded once, so that a bad one is named before anything is trained.

    Args:
        folder: Where they are.
        backbone_size: Side of the images the backbone was made for.
        fixed_size: Whether the backbone takes no other size.
        skip_unreadable: Leave unreadable images and masks out, with their partners, instead of refusing the folder.
        seed: Decides the split of a folder without `train/` and `val/`.

    Raises:
        UserError: An image without a mask or the reverse, a mask that is unreadable, of another size than its image,
            not of class numbers or of classes without a name; or fewer than two images or classes.
    """
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        train, val = _pairs(folder, folder / "train"), _pairs(folder, folder / "val")
    else:
        train, val = _split(folder, _pairs(folder, folder), seed)
    names = _names(folder)
    crop, side = crop_and_side(survey([image for image, _ in train]), backbone_size, fixed=fixed_size)
    workers = os.cpu_count() or 1
    highest: list[int] = []  # class of every mask

    def open_pair(pair: Pair) -> Tensor:
        picture, mask = _decode(pair)
        highest.append(_check(folder, pair[1], mask, picture.size, names))
        return _stack(picture, mask, side)

    listed, bad, splits = hashlib.sha256(), [], []
    for pairs, augment in ((train, True), (val, False)):
        kept = room_for(len(pairs), 4, side, of=len(train) + len(val))
        good, kept, wrong = read_all(pairs, open_pair, kept=kept, workers=workers)
        bad += [(pair[0], reason) for pair, reason in wrong]
        for path in (path for pair in good for path in pair):
            listed.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} {augment}\n".encode())

        def read(index: int, pairs: Sequence[Pair] = good) -> Tensor:
            return _stack(*_decode(pairs[index]), side)

        splits.append(PictureSplit(read, len(good), None, crop=crop, augment=augment, workers=workers, kept=kept))
    if bad and not skip_unreadable:
        raise unreadable(folder, bad)
    if not all(map(len, splits)):
        raise UserError(f"--data {folder}: no readable image is left to train on, or none to measure on.")
    for half, split in zip(("train on", "measure on"), splits, strict=True):
        if all(bool((split.targets(torch.tensor([i]), seed=0, epoch=0) == IGNORED).all()) for i in range(len(split))):
            raise UserError(
                f"--data {folder}: the masks of all {len(split)} images to {half} are ignored as a whole (class "
                f"{IGNORED}). Give some pixels a class."
            )
    classes = names or tuple(map(str, range(max(highest) + 1)))
    if len(classes) < 2:
        raise UserError(f"--data {folder}: one class only in the masks. Two or more are needed.")
    listed.update("\n".join(classes).encode())
    return Dataset(
        name=str(folder),
        description=f"images with masks in {folder.name}",
        classes=classes,
        image_size=(crop, crop),
        channels=3,
        side=side,
        mean=MEAN,
        std=STD,
        train=splits[0],
        val=splits[1],
        fingerprint=listed.hexdigest()[:16],
        unreadable=len(bad),
        task=SEGMENTATION.name,
    )


def _by_name(folder: Path, part: Path) -> dict[str, Path]:
    """The pictures in a folder by their name without its ending."""
    found: dict[str, Path] = {}
    for path in images_in(part):
        name = path.relative_to(part).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"--data {folder}: {found[name]} and {path} have one name. Remove or rename one of them.")
        found[name] = path
    return found


def _pairs(folder: Path, part: Path) -> list[Pair]:
    """Images and their masks, in the order of their names."""
    if not ((part / "images").is_dir() and (part / "masks").is_dir()):
        raise UserError(
            f"--data {folder}: no images/ and masks/ in {part}. Expected {part}/images/<name>.jpg and "
            f"{part}/masks/<name>.png, or both in train/ and in val/."
        )
    if all((part / "images" / half).is_dir() for half in ("train", "val")):
        raise UserError(
            f"--data {folder}: train/ and val/ inside {part / 'images'} would be mixed. Put images/ and masks/ into "
            f"train/ and into val/: {part}/train/images, {part}/train/masks and so on."
        )
    images, masks = _by_name(folder, part / "images"), _by_name(folder, part / "masks")
    for mask in masks.values():
        if mask.suffix.lower() not in LOSSLESS:
            raise UserError(f"--data {folder}: mask {mask} is compressed with loss. Save the class numbers as PNG.")
    for name, path in (images | masks).items():
        if name not in masks:
            raise UserError(
                f"--data {folder}: image {path} has no mask. Add {part / 'masks' / name}.png or remove the image."
            )
        if name not in images:
            raise UserError(
                f"--data {folder}: mask {path} has no image. Add it to {part / 'images'} by the same name or remove "
                "the mask."
            )
    if not images:
        raise UserError(f"--data {folder}: no images in {part / 'images'}.")
    return [(images[name], masks[name]) for name in sorted(images)]


def _split(folder: Path, pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """A fifth, at least one picture, is measured on."""
    if len(pairs) < 2:
        raise UserError(f"--data {folder}: one image only; two are needed, one to train on and one to measure on.")
    mixed = random.Random(str(seed)).sample(pairs, len(pairs))
    cut = max(1, len(pairs) // 5)
    return sorted(mixed[cut:]), sorted(mixed[:cut])


def _names(folder: Path) -> tuple[str, ...]:
    """Names of the classes from `classes.txt`; empty where there is none."""
    path = folder / NAMES
    if not path.exists():
        return ()
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {folder}: {path} is not readable as text. Write a class on each line.") from error
    if not 2 <= len(names) <= IGNORED:
        raise UserError(f"--data {folder}: {path} must name 2 to {IGNORED} classes, one on a line, got {len(names)}.")
    return names


def _decode(pair: Pair) -> tuple[Any, Any]:
    """Image and mask as PIL pictures, both upright: a mask fits the image as it lies in the file or as it is seen.

    Raises:
        ValueError: One of them cannot be read, or EXIF says to turn the image and the mask's size does not tell.
    """
    picture = decode(pair[0], turn=False)
    try:
        mask = decode(pair[1], numbers=True)
    except ValueError as error:
        raise ValueError(f"its mask {pair[1]}: {error}") from error
    turn = orientation(picture)
    turned = upright(picture, turn)
    if picture.size == turned.size == mask.size and turn != 1:
        raise ValueError(
            f"it is to be turned (EXIF orientation {turn}), and nothing tells whether its mask {pair[1]} is too; "
            "save the image upright, without EXIF"
        )
    return turned, mask if mask.size == turned.size else upright(mask, turn)


def _check(folder: Path, path: Path, mask: Any, size: tuple[int, int], names: Sequence[str]) -> int:
    """The highest class of a mask, -1 where all is ignored.

    Raises:
        UserError: It is no mask of its image; the message says what is wrong with it.
    """
    if mask.mode not in ("P", "L", "1"):
        raise UserError(
            f"--data {folder}: mask {path} holds {mask.mode} pixels, not one class number of 8 bits each. "
            f"Save it as an indexed or grey PNG whose values are the classes, {IGNORED} to ignore."
        )
    if mask.size != size:
        raise UserError(
            f"--data {folder}: mask {path} is {mask.size[0]} x {mask.size[1]}, its image {size[0]} x {size[1]}. "
            "Make them the same size."
        )
    values = np.flatnonzero(np.bincount(np.asarray(mask, dtype=np.uint8).ravel(), minlength=IGNORED + 1)[:IGNORED])
    highest = int(values[-1]) if len(values) else -1
    if names and highest >= len(names):
        raise UserError(
            f"--data {folder}: mask {path} has class {highest}, but {NAMES} names {len(names)}, 0 to {len(names) - 1}. "
            f"Name it there, or give those pixels {IGNORED} to ignore them."
        )
    return highest


def _stack(picture: Any, mask: Any, side: int) -> Tensor:
    """(4, side, side) uint8: the picture's channels and the classes, cut and scaled alike."""
    image = require("PIL.Image", extra="compare", purpose="reading images")
    classes = image.fromarray(np.asarray(mask, dtype=np.uint8))  # the numbers of a palette, not its colours
    return torch.cat([square(picture.convert("RGB"), side), square(classes, side, resample=NEAREST)])
