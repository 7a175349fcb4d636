"""Scores of a task, gathered batch by batch and summed over processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from visattn.tasks import SEGMENTATION, Task

__all__ = ["Overlap", "scores"]


class Overlap(Metric):
    """How well masks cover the truth: mIoU, pixel accuracy and the IoU of each class, ignored pixels aside.

    The intersection over union of a class is taken over all images together. mIoU is the mean over the classes that
    occur in the truth or in the predictions; of the others the IoU is NaN.

    torchmetrics' own confusion matrix takes a table of every pixel by every cell of the matrix where deterministic
    algorithms are asked for, as a trial does; counting whole numbers is exact in any order.

    Args:
        num_classes: How many classes there are.
        ignored: Pixels of this value in the truth are left out.
    """

    full_state_update = False
    counts: Tensor  # (K, K): truth, prediction

    def __init__(self, num_classes: int, ignored: int) -> None:
        super().__init__()
        self.num_classes, self.ignored = num_classes, ignored
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: (B, K, H, W) logits and (B, H, W) classes."""
        known = targets != self.ignored
        cells = targets[known] * self.num_classes + logits.argmax(1)[known]
        self.counts += torch.bincount(cells, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """`score` (mIoU), `pixel_accuracy` and `iou` (K,), each from 0 to 1 or NaN where there was nothing to count."""
        counts = self.counts.double()
        hits = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - hits
        iou = hits / union  # NaN where the union is empty
        return {"score": iou.nanmean(), "pixel_accuracy": hits.sum() / counts.sum(), "iou": iou}


def scores(task: Task, num_classes: int) -> Metric | MetricCollection:
    """What a task is measured by: `update(logits, targets)`, and `compute()` gives a dict with the main one as `score`.

    Args:
        task: The task.
        num_classes: How many classes there are.
    """
    if task is SEGMENTATION:
        return Overlap(num_classes, task.ignored)
    return MetricCollection({"score": MulticlassAccuracy(num_classes, average="micro")})
