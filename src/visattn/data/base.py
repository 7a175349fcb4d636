"""What a data set is to a trial: two splits that make batches, each batch a pure function of its arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

__all__ = ["Dataset", "Split"]


class Split(Protocol):
    """One half of a data set. A batch depends on nothing but the arguments, so trials that share them are paired."""

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def batch(self, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Make images.

        Args:
            indices: (B,) which images.
            seed: Seed of the trial; with `epoch` and the index it fixes the augmentation.
            epoch: Epoch, from 0. Splits without augmentation ignore seed and epoch.

        Returns:
            (B, C, H, W) float32, normalised.
        """
        ...

    def targets(self, indices: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Tell what is to be said of the images that `batch` makes of the same arguments.

        Returns:
            (B,) int64, the class of each image; for segmentation (B, H, W) int64, the class of each pixel, cropped and
            mirrored like the image, 255 where a pixel belongs to no class and is ignored.
        """
        ...

    def pictures(self, indices: Tensor) -> Tensor:
        """Make images as a person looks at them: (B, H, W) or (B, H, W, 3) uint8, without augmentation."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Images to compare on.

    Attributes:
        name: What the user called it.
        description: One sentence for the report.
        classes: Names of the classes, in the order of the targets.
        image_size: (H, W) of every batch.
        channels: 1 (grey) or 3 (RGB).
        side: What the shorter side of a picture is brought to, before its centre is cut out as a validation image.
        mean: What is subtracted from each channel of pixels from 0 to 1.
        std: What they are divided by then.
        train: The images trained on, augmented anew in every epoch.
        val: The images measured on, fixed.
        fingerprint: Changes when the images change, so that a run is not continued on other data.
        unreadable: How many files were left out because they could not be read.
        task: A key of `visattn.tasks.TASKS`: "classification" or "segmentation".
    """

    name: str
    description: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    channels: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split = field(repr=False)
    val: Split = field(repr=False)
    fingerprint: str
    unreadable: int = 0
    task: str = "classification"
