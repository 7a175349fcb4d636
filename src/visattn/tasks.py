"""What differs between naming images and naming every pixel: the loss, what counts, the name of the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from visattn.errors import did_you_mean

__all__ = ["CLASSIFICATION", "IGNORED", "SEGMENTATION", "TASKS", "Task", "main_output", "task_named"]

IGNORED = 255  # the value of a pixel that belongs to no class: it is neither trained nor measured on

Output = Tensor | Sequence[Tensor]
"""Logits, or several of them, the main ones first, as networks with auxiliary heads give in training."""


@dataclass(frozen=True)
class Task:
    """One kind of question asked of an image.

    Attributes:
        name: As in `--task`.
        key: The main score in the names of columns.
        score: The main score in texts; it is kept as a share and shown in percent.
        control: What the arm is called that has more capacity without attention.
        ignored: Targets of this value count nowhere.
    """

    name: str
    key: str
    score: str
    control: str
    ignored: int

    @property
    def heading(self) -> str:
        """The main score where a text begins with it."""
        return self.score.capitalize() if self.score.islower() else self.score

    def loss(self, output: Output, targets: Tensor) -> Tensor:
        """Cross-entropy, in float32, mean over what is not ignored (0 where all of it is); of several outputs the sum.

        Args:
            output: (B, K) or (B, K, H, W) logits, or a sequence of such.
            targets: (B,) or (B, H, W) classes.
        """
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        counted = self.counted(targets).clamp(min=1)
        sums = [
            functional.cross_entropy(logits.float(), targets, ignore_index=self.ignored, reduction="sum")
            for logits in outputs
        ]
        return torch.stack(sums).sum() / counted

    def counted(self, targets: Tensor) -> Tensor:
        """How many targets are not ignored."""
        return (targets != self.ignored).sum()


CLASSIFICATION = Task("classification", "top1", "top-1", "control block", ignored=-100)
SEGMENTATION = Task("segmentation", "miou", "mIoU", "control head", ignored=IGNORED)
TASKS = {task.name: task for task in (CLASSIFICATION, SEGMENTATION)}


def task_named(name: str) -> Task:
    """Look a task up.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS, "")
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}. {hint}".strip())
    return TASKS[name]


def main_output(output: Output) -> Tensor:
    """The logits that answer, of a network that may have auxiliary heads."""
    return output if isinstance(output, Tensor) else output[0]
