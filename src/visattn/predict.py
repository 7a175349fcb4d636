"""What a trained network says of pictures: a class for each, or a class for every pixel."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional

from visattn.colours import hex_code, indexed, palette
from visattn.compare.weights import Description, load_network
from visattn.data.pictures import decode, images_in
from visattn.devices import find_device
from visattn.errors import UserError, require
from visattn.tasks import CLASSIFICATION, main_output
from visattn.writing import write_json, write_text

__all__ = ["Predictions", "find_images", "predict", "show"]

TABLE = "predictions.csv"
TOP = 5  # classes named for a picture
SHOWN = 20  # rows printed
COMMON = 32  # what the stages of nearly every network divide its input by
BRIEF = 4  # classes printed for a mask
BACKGROUND = "background"  # the class that an overlay leaves clear


@dataclass
class Predictions:
    """What was found.

    Attributes:
        columns: Of the table.
        headings: Of its short form.
        rows: One for each picture read.
        brief: The same in short.
        unreadable: The other pictures, with the reason.
    """

    columns: list[str]
    headings: list[str]
    rows: list[list[str]] = field(default_factory=list)
    brief: list[list[str]] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


def find_images(arguments: Sequence[Path], out: Path) -> list[Path]:
    """The files that arguments mean: files as they are, the pictures in folders and below, none twice.

    Args:
        arguments: Files and folders.
        out: A folder whose pictures are not taken, as they are results.

    Raises:
        UserError: A path that is not there, or no picture at all.
    """
    found: dict[str, Path] = {}
    passed = 0
    results = os.path.join(os.path.abspath(out), "")
    for argument in arguments:
        if not argument.exists():
            raise UserError(f"{argument}: no such file or folder.")
        for path in images_in(argument) if argument.is_dir() else [argument]:
            place = os.path.abspath(path)
            if place.startswith(results):
                passed += 1
            else:
                found.setdefault(place, path)
    if passed and not found:
        raise UserError(f"--out {out}: all {passed} images lie in it, where results go. Use another --out.")
    if not found:
        raise UserError(f"no images in {', '.join(map(str, arguments))}.")
    return list(found.values())


def _check_out(out: Path) -> None:
    """Raise `UserError` unless a folder is new, empty or one of earlier predictions."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file. Give a folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / TABLE).is_file():
        raise UserError(f"--out {out}: not empty and without {TABLE} of visattn predict. Use another --out.")


def predict(
    weights: Path,
    images: Sequence[Path],
    out: Path,
    *,
    device: str = "auto",
    batch_size: int = 16,
    on_batch: Callable[[int, int], None] = lambda done, of: None,
) -> Predictions:
    """Run a network over pictures and write what it says, as `visattn predict` does.

    Pictures are prepared as the validation images of the training were. For classification that is their central
    square. For segmentation it is the whole picture, its shorter side as long as in training and its shape kept (a
    network of a fixed size gets it squeezed to that), and the mask comes back at the picture's own size.

    Args:
        weights: `weights.safetensors` of `visattn train` or of a trial of `visattn compare`.
        images: Files and folders.
        out: The folder written to; files of the same names from earlier predictions are replaced.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        batch_size: Pictures at a time.
        on_batch: Called after every batch with the pictures done and their number in all.

    Returns:
        The table that was written, and the files that could not be read.

    Raises:
        UserError: The weights, an argument or the folder are not fit; nothing was written.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, got {batch_size}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = find_device(device, "visattn predict")
    net, description = load_network(weights)
    files = find_images(images, out)
    _check_out(out)
    net = net.to(place).eval()
    kind = _Classes if description.task == CLASSIFICATION.name else _Masks
    work = kind(net, description, files, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _run(work, files, batch_size, on_batch)
        work.finish()
        write_text(out / TABLE, _table(work.found))
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}).") from error
    return work.found


def _run(work: _Classes | _Masks, files: Sequence[Path], batch_size: int, on_batch: Callable[[int, int], None]) -> None:
    def attempt(path: Path) -> Any:
        try:
            return work.read(path)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, torch.inference_mode():
        for start in range(0, len(files), batch_size):
            some = files[start : start + batch_size]
            good = []
            for path, read in zip(some, pool.map(attempt, some), strict=True):
                if isinstance(read, str):
                    work.found.unreadable.append((path, read))
                else:
                    good.append((path, read))
            if good:
                work.take(good)
            on_batch(start + len(some), len(files))


def show(found: Predictions, out: Path) -> None:
    """Print the first rows of a table, and where all of it lies."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in found.headings:
        table.add_column(column, overflow="fold")
    for row in found.brief[:SHOWN]:
        table.add_row(*map(Text, row))  # names of files are no markup
    console = Console()
    if found.rows:
        console.print(table)
    more = f", {len(found.rows) - SHOWN} more than shown" if len(found.rows) > SHOWN else ""
    count = "1 image" if len(found.rows) == 1 else f"{len(found.rows)} images"
    console.print(Text(f"{count} in {out / TABLE}{more}"), soft_wrap=True)


def _table(found: Predictions) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(found.columns)
    writer.writerows(found.rows)
    return text.getvalue()


def _shown(path: Path) -> str:
    """A path as text that can be written, whatever bytes are in it."""
    return os.fsencode(path).decode("utf-8", "replace")


class _Classes:
    """Classification: a row of the table for every picture.

    Args:
        net: The network.
        description: What it was trained on.
        files: All pictures to come.
        out: Where results go.
    """

    def __init__(self, net: nn.Module, description: Description, files: Sequence[Path], out: Path) -> None:
        self.net, self.description = net, description
        columns = ["file", "class", "probability"]
        for rank in range(2, min(TOP, len(description.classes)) + 1):
            columns += [f"class {rank}", f"probability {rank}"]
        self.found = Predictions(columns, columns[:3])

    def read(self, path: Path) -> Tensor:
        """(C, H, W), normalised.

        Raises:
            ValueError: No picture can be read.
        """
        return self.description.central(decode(path))

    def take(self, some: Sequence[tuple[Path, Tensor]]) -> None:
        """Name a batch of pictures."""
        images = torch.stack([image for _, image in some]).to(_place(self.net))
        chances = self.net(images).float().softmax(1).cpu()
        best = chances.topk(min(TOP, chances.shape[1]), dim=1)
        for (path, _), values, indices in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
            row = [_shown(path)]
            for value, index in zip(values, indices, strict=True):
                row += [self.description.classes[index], f"{value:.6f}"]
            self.found.rows.append(row)
            self.found.brief.append([*row[:2], f"{values[0]:.3f}"])

    def finish(self) -> None:
        """The table is all."""


class _Masks:
    """Segmentation: a mask and an overlay for every picture, and the share of every class in the table.

    Args:
        net: The network.
        description: What it was trained on.
        files: All pictures to come.
        out: Where results go.
    """

    def __init__(self, net: nn.Module, description: Description, files: Sequence[Path], out: Path) -> None:
        self.net, self.description, self.out = net, description, out
        self.names = dict(zip(files, _names(files), strict=True))
        columns = ["file", "mask", "overlay", *(f"share of {name}" for name in description.classes)]
        self.found = Predictions(columns, ["file", "largest classes"])

    def read(self, path: Path) -> tuple[Tensor, Any]:
        """(C, H, W), normalised, and the picture in RGB.

        Raises:
            ValueError: No picture can be read.
        """
        picture = decode(path)
        return self.description.whole(picture), picture.convert("RGB")

    def take(self, some: Sequence[tuple[Path, tuple[Tensor, Any]]]) -> None:
        """Label the pixels of a batch of pictures, those of one size together."""
        sizes: dict[torch.Size, list[tuple[Path, tuple[Tensor, Any]]]] = {}
        for item in some:
            sizes.setdefault(item[1][0].shape, []).append(item)
        for group in sizes.values():
            images = torch.stack([image for _, (image, _) in group]).to(_place(self.net))
            logits = self._logits(images).float()
            for (path, (_, picture)), scores in zip(group, logits, strict=True):
                self._write(path, picture, _labels(scores, (picture.height, picture.width)))

    def _logits(self, images: Tensor) -> Tensor:
        """(B, K, h, w); networks that add up maps of several scales get the nearest size that all of these divide."""
        try:
            return main_output(self.net(images))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            size = [max(1, round(length / COMMON)) * COMMON for length in images.shape[2:]]
            if size == list(images.shape[2:]):
                raise
            return main_output(self.net(functional.interpolate(images, size=size, mode="bilinear", antialias=True)))

    def _write(self, path: Path, picture: Any, labels: Tensor) -> None:
        image = require("PIL.Image", extra="compare", purpose="visattn predict")
        name = self.names[path]
        mask = indexed(labels.numpy(), len(self.description.classes))
        clear = [0 if entry == BACKGROUND else 140 for entry in self.description.classes]
        alpha = image.fromarray(torch.tensor(clear, dtype=torch.uint8)[labels.long()].numpy())
        overlay = image.composite(mask.convert("RGB"), picture, alpha)
        for folder, drawn in (("masks", mask), ("overlays", overlay)):
            target = self.out / folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(target)
        shares = torch.bincount(labels.flatten(), minlength=len(self.description.classes)) / labels.numel()
        files = [_shown(path), f"masks/{_shown(Path(name))}", f"overlays/{_shown(Path(name))}"]
        self.found.rows.append([*files, *(f"{share:.6f}" for share in shares.tolist())])
        largest = shares.argsort(descending=True, stable=True)[:BRIEF].tolist()
        said = [f"{self.description.classes[index]} {100 * shares[index]:.1f}%" for index in largest if shares[index]]
        self.found.brief.append([files[0], ", ".join(said)])

    def finish(self) -> None:
        """Write which colour and which index is which class."""
        classes = self.description.classes
        colours = palette(len(classes))
        legend = [
            {"index": index, "class": name, "colour": hex_code(colours[index])} for index, name in enumerate(classes)
        ]
        write_json(self.out / "classes.json", legend)


def _place(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class of every pixel: (K, h, w) scores to (H, W) uint8.

    One class at a time is brought to the size of the picture: all of them at once would not fit for a large picture.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    labels = torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for index, score in enumerate(scores):
        large = functional.interpolate(score[None, None], size=size, mode="bilinear", align_corners=True)[0, 0]
        better = large > best
        best = torch.where(better, large, best)
        labels.masked_fill_(better, index)
    return labels.cpu()


def _names(files: Sequence[Path]) -> list[str]:
    """A PNG for each file, in folders as the files are, below the folder that they share; no two alike."""
    places = [Path(os.path.abspath(path)) for path in files]
    shared = os.path.commonpath([place.parent for place in places])
    taken: set[str] = set()
    names = []
    for place in places:
        inner = place.relative_to(shared)
        name = next(name for name in _candidates(inner) if name.casefold() not in taken)
        taken.add(name.casefold())  # on some systems A.png and a.png are one file
        names.append(name)
    return names


def _candidates(inner: Path) -> Iterator[str]:
    """`1.png`, for a second picture of that name `1.jpg.png`, for whatever is left `1.jpg-2.png` and so on."""
    yield inner.with_suffix(".png").as_posix()
    yield f"{inner.as_posix()}.png"
    number = 2
    while True:
        yield f"{inner.as_posix()}-{number}.png"
        number += 1
