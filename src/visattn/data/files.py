"""Pictures from folders, and from any data set that `timm.data` opens."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visattn.data.base import Dataset
from visattn.errors import UserError, one_line, require

__all__ = ["TIMM_PREFIXES", "PictureSplit", "from_folder", "from_timm"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
MEMORY = 2 * 1024**3  # decoded pictures are kept up to this many bytes; beyond it they are read anew in every epoch
MARGIN = 8 / 7  # pictures are kept this much larger than the crop, the room in which the random crop moves
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")

Read = Callable[[int], Tensor]


def _square(picture: Any, side: int) -> Tensor:
    """The central square of a PIL picture as (3, side, side) uint8."""
    functional = require("torchvision.transforms.v2.functional", extra="compare", purpose="reading images")
    picture = picture.convert("RGB")
    half = min(picture.size)
    left, top = (picture.width - half) // 2, (picture.height - half) // 2
    picture = picture.resize((side, side), resample=2, box=(left, top, left + half, top + half))
    tensor: Tensor = functional.pil_to_tensor(picture)
    return tensor


def _open(path: Path, side: int) -> Tensor:
    """Decode one file.

    Raises:
        ValueError: It is no whole picture within the limits; the message says what is wrong.
    """
    image = require("PIL.Image", extra="compare", purpose="reading images")
    try:
        with image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,}")
            return _square(picture, side)
    except image.UnidentifiedImageError:
        raise ValueError("not an image") from None
    except (OSError, SyntaxError, EOFError, image.DecompressionBombError, image.DecompressionBombWarning) as error:
        raise ValueError(str(error) or type(error).__name__) from error


class PictureSplit:
    """Pictures behind a reading function, cropped and mirrored at random where they are trained on.

    Args:
        read: Index to (3, side, side) uint8.
        labels: (N,) classes.
        crop: Side of the batches; the random crop moves in the margin between it and `side`.
        augment: Whether to crop and mirror at random instead of taking the centre.
        workers: Threads that read.
        kept: Pictures read already, in order; None reads them when they are asked for.
    """

    def __init__(
        self,
        read: Read,
        labels: Tensor,
        *,
        crop: int,
        augment: bool,
        workers: int,
        kept: Tensor | None = None,
    ) -> None:
        self.read, self.labels, self.crop, self.augment, self.workers, self.kept = (
            read,
            labels,
            crop,
            augment,
            workers,
            kept,
        )

    def _pictures(self, indices: Tensor) -> Tensor:
        if self.kept is not None:
            return self.kept[indices]
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.stack(list(pool.map(self.read, indices.tolist())))

    def batch(self, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
        """(B, 3, crop, crop) float32, normalised."""
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
        return torch.stack(crops).to(torch.float32).div_(255).sub_(MEAN).div_(STD)

    def pictures(self, indices: Tensor) -> Tensor:
        """(B, crop, crop, 3) uint8, the centre."""
        pictures = self._pictures(indices)
        start = (pictures.shape[-1] - self.crop) // 2
        return pictures[:, :, start : start + self.crop, start : start + self.crop].permute(0, 2, 3, 1)


def _crop_and_side(sizes: Sequence[int], backbone_size: int, *, fixed: bool) -> tuple[int, int]:
    """Side of a batch: the backbone's own, or less where the pictures are smaller and the backbone takes any size."""
    typical = sorted(sizes)[len(sizes) // 2]
    crop = backbone_size if fixed else min(backbone_size, max(32, -(-typical // 32) * 32))
    return crop, round(crop * MARGIN)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    found = (Path(base) / name for base, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def _listing(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Classes of a folder of class folders, and its image files with their class."""
    filled = [(sub, files) for sub in _class_folders(folder) if (files := _images(sub))]
    if not filled:
        raise UserError(
            f"--data {folder}: no images in class folders. Expected {folder}/<class>/<image>, with files that end in "
            f"{', '.join(SUFFIXES)}."
        )
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


def _survey(files: Sequence[Path]) -> list[int]:
    """Shorter sides of some pictures, those that can be opened."""
    image = require("PIL.Image", extra="compare", purpose="reading images")
    step = max(1, len(files) // 200)
    sides = []
    for path in files[::step]:
        try:
            with image.open(path, formats=FORMATS) as picture:
                sides.append(min(picture.size))
        except (OSError, image.DecompressionBombError, image.DecompressionBombWarning):
            continue  # `_read_all` names it
    return sides or [32]


def _read_all(
    items: list[tuple[Path, int]], side: int, *, keep: bool, workers: int
) -> tuple[list[tuple[Path, int]], Tensor | None, list[tuple[Path, str]]]:
    """Decode every file once: those that are whole, their pictures if they are kept, and the others with the reason."""
    good: list[tuple[Path, int]] = []
    bad: list[tuple[Path, str]] = []
    kept = torch.empty(len(items) if keep else 0, 3, side, side, dtype=torch.uint8)

    def attempt(item: tuple[Path, int]) -> Tensor | str:
        try:
            return _open(item[0], side)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), 256):
            some = items[start : start + 256]
            for item, found in zip(some, pool.map(attempt, some), strict=True):
                if isinstance(found, str):
                    bad.append((item[0], found))
                    continue
                if keep:
                    kept[len(good)] = found
                good.append(item)
    return good, kept[: len(good)] if keep else None, bad


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
    crop, side = _crop_and_side(_survey([path for path, _ in train]), backbone_size, fixed=fixed_size)
    keep = (len(train) + len(val)) * 3 * side**2 <= MEMORY
    workers = os.cpu_count() or 1

    unreadable: list[tuple[Path, str]] = []
    halves = []
    for items, augment in ((train, True), (val, False)):
        good, kept, bad = _read_all(items, side, keep=keep, workers=workers)
        unreadable += bad
        halves.append((good, kept, augment))
    if unreadable and not skip_unreadable:
        path, reason = unreadable[0]
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise UserError(
            f"--data {folder}: unreadable image {path}{more}: {reason}. "
            "Mend or remove it, or add --skip-unreadable to go on without."
        )
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
            return _open(paths[index], side)

        splits.append(PictureSplit(read, labels, crop=crop, augment=augment, workers=workers, kept=kept))
    return Dataset(
        name=str(folder),
        description=f"images of {len(classes)} classes in {folder.name}",
        classes=tuple(classes),
        image_size=(crop, crop),
        channels=3,
        train=splits[0],
        val=splits[1],
        fingerprint=listed.hexdigest()[:16],
        unreadable=len(unreadable),
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


def _classes(dataset: Any, labels: Tensor) -> tuple[str, ...]:
    """Names of the classes, numbers where the data set has no names."""
    names = getattr(dataset, "classes", None)
    index = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if names is None and index:
        names = sorted(index, key=lambda name: index[name])
    count = int(labels.max()) + 1
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
    digest = hashlib.sha256(name.encode())
    for dataset, augment in zip(opened, (True, False), strict=True):
        pictures: list[Tensor] = []
        labels: list[int] = []
        for picture, label in _items(name, dataset):
            if not crop:
                crop, side = _crop_and_side([min(picture.size)], backbone_size, fixed=fixed_size)
            pictures.append(_square(picture, side))
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

        def read(index: int, kept: Tensor = kept) -> Tensor:
            return kept[index]

        splits.append(
            PictureSplit(
                read, torch.tensor(labels, dtype=torch.int64), crop=crop, augment=augment, workers=1, kept=kept
            )
        )
    classes = _classes(opened[0], splits[0].labels)
    if len(set(splits[0].labels.tolist())) < 2:
        raise UserError(f"--data {name}: one class only. Two or more are needed.")
    if int(splits[1].labels.max()) >= len(classes):
        raise UserError(f"--data {name}: the validation split has classes that the train split lacks.")
    return Dataset(
        name=name,
        description=f"{name}, opened by timm.data",
        classes=classes,
        image_size=(crop, crop),
        channels=3,
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
