"""The images a comparison runs on: the embedded default, folders, and whatever `timm.data` opens."""

from __future__ import annotations

from pathlib import Path

from visattn.data.base import Dataset, Split
from visattn.data.digits import NAME as CLUTTERED_DIGITS
from visattn.data.digits import cluttered_digits
from visattn.data.files import TIMM_PREFIXES, from_folder, from_timm
from visattn.data.masks import from_masks
from visattn.errors import UserError
from visattn.tasks import CLASSIFICATION, SEGMENTATION, task_named

__all__ = ["CLUTTERED_DIGITS", "Dataset", "Split", "cluttered_digits", "open_data"]


FEWER = {"train": 800, "val": 200}  # digits with masks: a network for pixels takes many times as long for each


def open_data(
    name: str,
    *,
    backbone_size: int,
    fixed_size: bool,
    skip_unreadable: bool = False,
    task: str = CLASSIFICATION.name,
) -> Dataset:
    """Open the data set a user names.

    Args:
        name: `cluttered-digits`, a folder, or a name of `timm.data` with its prefix, such as `torch/cifar10`.
        backbone_size: Side of the images the backbone was made for.
        fixed_size: Whether the backbone takes no other size.
        skip_unreadable: Leave unreadable files of a folder out instead of refusing it.
        task: A key of `visattn.tasks.TASKS`. For segmentation a folder holds `images/` and `masks/`.

    Raises:
        UserError: There is no such data set, or something in it is not fit to compare on.
    """
    masks = task_named(task) is SEGMENTATION
    if name == CLUTTERED_DIGITS:
        return cluttered_digits(task=task, **(FEWER if masks else {}))
    path = Path(name).expanduser()
    if path.is_dir():
        open_folder = from_masks if masks else from_folder
        return open_folder(path, backbone_size=backbone_size, fixed_size=fixed_size, skip_unreadable=skip_unreadable)
    if path.exists():
        what = "images/ and masks/" if masks else "class folders"
        raise UserError(f"--data {name}: a file. Give a folder of {what}.")
    if masks:
        raise UserError(
            f"--data {name}: no such path. Segmentation takes a folder with images/ and masks/, or "
            f"{CLUTTERED_DIGITS!r}."
        )
    if name.split("/")[0] in TIMM_PREFIXES and "/" in name:
        return from_timm(name, backbone_size=backbone_size, fixed_size=fixed_size)
    raise UserError(
        f"--data {name}: no such path. Give a folder, {CLUTTERED_DIGITS!r}, or a name of timm.data such as "
        "'torch/cifar10' or 'hfds/<name on the hub>'."
    )
