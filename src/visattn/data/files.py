"""Pictures from folders, and from any data set that `timm.data` opens."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visattn.data.base import Dataset
from visattn.data.pictures import (
    MEAN,
    MEMORY,
    STD,
    SUFFIXES,
    PictureSplit,
    crop_and_side,
    images_in,
    open_picture,
    read_all,
    room_for,
    square,
    survey,
    unreadable,
)
from visattn.errors import UserError, one_line, require

__all__ = ["TIMM_PREFIXES", "from_folder", "from_timm"]

TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _listing(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Classes of a folder of class folders, and its image files with their class."""
    filled = [(sub, files) for sub in _class_folders(folder) if (files := images_in(sub))]
    if not filled:
        raise UserError(
            f"--data {folder}: no images in class folders. Expected {folder}/<class>/<image>, with files that end in "
            f"{', '.join(SUFFIXES)}."
        )
    if {sub.name for sub, _ in filled} == {"images", "masks"}:
        raise UserError(f"--data {folder}: images/ and masks/ are for segmentation. Give --task segmentation.")
    if len(filled) == 1 and filled[0][0].name in ("train", "val"):
        raise UserError(
            f"--data {folder}: {filled[0][0].name}/ alone. Give train/ and val/, or one folder of class folders."
        )
    if len(filled) == 1:
        raise UserError(
            f"--data {folder}: one class only, {filled[0][0].name!r}. Give a folder for each of two or more."
        )
    return [sub.name for sub, _ in filled], [(p, label) for label, (_, files) in enumerate(filled) for p in files]


def _split(
    folder: Path, items: list[tuple[Path, int]], seed: int
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """A fifth of every class, at least one picture, is measured on."""
    train, val = [], []
    for label in sorted({label for _, label in items}):
        mine = [item for item in items if item[1] == label]
        random.Random(f"{seed} {label}").shuffle(mine)
        if len(mine) < 2:
            raise UserError(
                f"--data {folder}: class {mine[0][0].parent.name!r} has one image only; two are needed, "
                "one to train on and one to measure on."
            )
        cut = max(1, len(mine) // 5)
        val += mine[:cut]
        train += mine[cut:]
    return sorted(train), sorted(val)


def from_folder(
    folder: Path, *, backbone_size: int, fixed_size: bool, skip_unreadable: bool = False, seed: int = 0
) -> Dataset:
    """Open `train/` and `val/` with class folders, or one folder of class folders, split by the seed.

    Every file is decoded once, so that a bad one is named before anything is trained.

    Args:
        folder: Where the images are.
        backbone_size: Side of the images the backbone was made for.
        fixed_size: Whether the backbone takes no other size.
        skip_unreadable: Leave unreadable images out instead of refusing the folder.
        seed: Decides the split of a folder without `train/` and `val/`.

    Raises:
        UserError: No images, fewer than two classes, classes of `val/` that `train/` lacks, an unreadable image.
    """
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        classes, train = _listing(folder / "train")
        val_classes, val = _listing(folder / "val")
        if strange := sorted(set(val_classes) - set(classes)):
            raise UserError(f"--data {folder}: val/ has classes that train/ lacks: {', '.join(strange)}.")
        val = [(path, classes.index(val_classes[label])) for path, label in val]
    else:
        classes, everything = _listing(folder)
        train, val = _split(folder, everything, seed)
    crop, side = crop_and_side(survey([path for path, _ in train]), backbone_size, fixed=fixed_size)
    workers = os.cpu_count() or 1

    bad: list[tuple[Path, str]] = []
    halves = []
    for items, augment in ((train, True), (val, False)):
        kept = room_for(len(items), 3, side, of=len(train) + len(val))
        good, kept, wrong = read_all(items, lambda item: open_picture(item[0], side), kept=kept, workers=workers)
        bad += [(path, reason) for (path, _), reason in wrong]
        halves.append((good, kept, augment))
    if bad and not skip_unreadable:
        raise unreadable(folder, bad)
    listed = hashlib.sha256()
    splits = []
    for good, kept, augment in halves:
        labels = torch.tensor([label for _, label in good], dtype=torch.int64)
        if not good or (augment and len(set(labels.tolist())) < len(classes)):
            raise UserError(f"--data {folder}: a class has no readable image left to train on, or none to measure on.")
        paths = [path for path, _ in good]
        for path in paths:
            listed.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} {augment}\n".encode())

        def read(index: int, paths: list[Path] = paths) -> Tensor:
            return open_picture(paths[index], side)

        splits.append(PictureSplit(read, len(labels), labels, crop=crop, augment=augment, workers=workers, kept=kept))
    return Dataset(
        name=str(folder),
        description=f"images by class in {folder.name}",
        classes=tuple(classes),
        image_size=(crop, crop),
        channels=3,
        side=side,
        mean=MEAN,
        std=STD,
        train=splits[0],
        val=splits[1],
        fingerprint=listed.hexdigest()[:16],
        unreadable=len(bad),
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visattn"


def _timm_split(name: str, *splits: str) -> Any:
    """Open the first of some splits that there is through timm; a failure is one line."""
    data = require("timm.data", extra="compare", purpose="--data")
    root = _cache()
    root.mkdir(parents=True, exist_ok=True)
    options = {"download": True} if name.startswith(("torch/", "tfds/")) else {}
    failures: list[str] = []
    for split in splits:
        try:
            return data.create_dataset(name, root=str(root), split=split, is_training=False, batch_size=1, **options)
        except Exception as error:  # whatever the library behind the name raises: no such name, split or network
            failures.append(one_line(error))
    raise UserError(f"--data {name}: timm.data could not open its {splits[0]} split: {failures[0][:300]}")


def _classes(dataset: Any, count: int) -> tuple[str, ...]:
    """Names of the classes, numbers where the data set has no names."""
    names = getattr(dataset, "classes", None)
    index = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if names is None and index:
        names = sorted(index, key=lambda name: index[name])
    return tuple(map(str, names)) if names is not None and len(names) >= count else tuple(map(str, range(count)))


def from_timm(name: str, *, backbone_size: int, fixed_size: bool) -> Dataset:
    """Open a data set by a name of `timm.data.create_dataset`, such as `torch/cifar10` or `hfds/<hub name>`.

    All pictures are read once, in order, and kept in memory.

    Args:
        name: The name, with timm's prefix.
        backbone_size: Side of the images the backbone was made for.
        fixed_size: Whether the backbone takes no other size.

    Raises:
        UserError: timm cannot open it, one class only, or it does not fit the memory set aside for pictures.
    """
    opened = [_timm_split(name, "train"), _timm_split(name, "validation", "test")]
    crop = side = 0
    splits: list[PictureSplit] = []
    found: list[list[int]] = []  # labels of both
    digest = hashlib.sha256(name.encode())
    for dataset, augment in zip(opened, (True, False), strict=True):
        pictures: list[Tensor] = []
        labels: list[int] = []
        for picture, label in _items(name, dataset):
            if not crop:
                crop, side = crop_and_side([min(picture.size)], backbone_size, fixed=fixed_size)
            pictures.append(square(picture.convert("RGB"), side))
            labels.append(int(label))
            if len(pictures) * 3 * side**2 > MEMORY:
                raise UserError(
                    f"--data {name}: its pictures at {side} x {side} take more than {MEMORY // 1024**3} GiB. "
                    "Save it as folders of images and give the folder: those are read from disk."
                )
        if not pictures:
            raise UserError(f"--data {name}: no images in its {'train' if augment else 'validation'} split.")
        kept = torch.stack(pictures)
        digest.update(f"{len(labels)} {labels[:1000]}".encode())
        found.append(labels)

        def read(index: int, kept: Tensor = kept) -> Tensor:
            return kept[index]

        splits.append(
            PictureSplit(
                read,
                len(labels),
                torch.tensor(labels, dtype=torch.int64),
                crop=crop,
                augment=augment,
                workers=1,
                kept=kept,
            )
        )
    classes = _classes(opened[0], max(found[0]) + 1)
    if len(set(found[0])) < 2:
        raise UserError(f"--data {name}: one class only. Two or more are needed.")
    if max(found[1]) >= len(classes):
        raise UserError(f"--data {name}: the validation split has classes that the train split lacks.")
    return Dataset(
        name=name,
        description=f"{name}, opened by timm.data",
        classes=classes,
        image_size=(crop, crop),
        channels=3,
        side=side,
        mean=MEAN,
        std=STD,
        train=splits[0],
        val=splits[1],
        fingerprint=digest.hexdigest()[:16],
    )


def _items(name: str, dataset: Any) -> Iterator[tuple[Any, int]]:
    try:
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            for index in range(len(dataset)):
                yield dataset[index]
        else:
            yield from dataset
    except Exception as error:  # a download that breaks off in the middle, a picture the reader cannot decode
        raise UserError(f"--data {name}: reading failed: {one_line(error)[:300]}") from error
