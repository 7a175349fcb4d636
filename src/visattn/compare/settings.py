"""What the user asks of a comparison, checked."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visattn.devices import PRECISIONS
from visattn.errors import UserError, did_you_mean, require
from visattn.registry import MECHANISMS, resolve
from visattn.tasks import CLASSIFICATION, SEGMENTATION, TASKS

__all__ = [
    "DEFAULTS",
    "DEFAULT_BACKBONE",
    "FORMAT",
    "STRATEGIES",
    "Settings",
    "command_line",
    "known_mechanisms",
    "resolved",
]

DEFAULT_BACKBONE = "test_byobnet"
FORMAT = 2  # of the run folder
# A step on masks takes long on two cores. In the few minutes of a first look, small batches learn the most.
DEFAULTS: dict[str, dict[str, Any]] = {SEGMENTATION.name: {"epochs": 3, "seeds": 2, "batch_size": 8}}
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison.

    Attributes:
        task: A key of `visattn.tasks.TASKS`.
        data: `cluttered-digits`, a folder of images, or a name `timm.data` opens.
        backbone: A name of timm.
        mechanisms: Names or aliases of blocks to compare.
        at: Module names or patterns where they go; empty for the deepest stage whose map is at least 7x7. Segmentation
            has one place for all, before the classifier of the head.
        epochs: Passes over the training images in each trial.
        seeds: How many times each arm is trained, with seeds 0, 1, ...
        batch_size: Images in a training step.
        lr: Peak learning rate of AdamW.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        precision: "float32", "bfloat16" or "float16" (the latter two as autocast).
        out: The run folder.
        output_stride: Of the features under the head, for segmentation; None for 8, or 4 on images of less than 128.
        skip_unreadable: Leave unreadable images out instead of refusing the data.
    """

    task: str = CLASSIFICATION.name
    data: str = "cluttered-digits"
    backbone: str = DEFAULT_BACKBONE
    mechanisms: tuple[str, ...] = MECHANISMS
    at: tuple[str, ...] = ()
    epochs: int = 20
    seeds: int = 3
    batch_size: int = 64
    lr: float = 4e-3
    device: str = "auto"
    precision: str = "float32"
    out: Path = Path("visattn-compare")
    output_stride: int | None = None
    skip_unreadable: bool = False

    @classmethod
    def of_task(cls, task: str, **given: Any) -> Settings:
        """Settings with a task's own defaults for what is not given or None."""
        defaults = DEFAULTS.get(task, {})
        return cls(task=task, **defaults | {name: value for name, value in given.items() if value is not None})

    def command(self) -> str:
        """The command line that repeats the run."""
        return command_line(
            "compare",
            task=self.task,
            data=self.data,
            backbone=self.backbone,
            mechanisms=self.mechanisms,
            at=self.chosen_at,
            output_stride=self.output_stride,
            epochs=self.epochs,
            seeds=self.seeds,
            batch_size=self.batch_size,
            lr=self.lr,
            device=self.device,
            precision=self.precision,
            out=self.out,
            skip_unreadable=self.skip_unreadable,
        )

    @property
    def chosen_at(self) -> tuple[str, ...]:
        """The places as far as they are the user's to choose, which under a segmentation head they are not."""
        return () if self.task == SEGMENTATION.name else self.at

    def record(self) -> dict[str, Any]:
        """What decides the results, as JSON; `out` does not."""
        return {
            "task": self.task,
            "data": self.data,
            "backbone": self.backbone,
            "mechanisms": list(self.mechanisms),
            "at": list(self.at),
            "epochs": self.epochs,
            "seeds": list(range(self.seeds)),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "device": self.device,
            "precision": self.precision,
            "output_stride": self.output_stride,
            "skip_unreadable": self.skip_unreadable,
        }


def command_line(command: str, **options: object) -> str:
    """The words of a command with these options, as a shell takes them; what is None, False or empty is left out."""
    words = ["visattn", command]
    for name, value in options.items():
        if value is None or value is False or value == ():
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(",".join(value) if isinstance(value, tuple) else str(value))
    return shlex.join(words)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:<index>, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices. Use --device cpu.")
    return str(device)


def known_mechanisms(names: tuple[str, ...], option: str = "--mechanisms") -> tuple[str, ...]:
    """Registry keys of the blocks for feature maps that names mean.

    Raises:
        UserError: There is no such block, or no name at all; the message begins with the option.
    """
    keys = []
    for name in names:
        try:
            card = resolve(name)
        except ValueError as error:
            raise UserError(f"{option}: {error}") from error
        if card.role not in ("attention", "convolution"):
            raise UserError(f"{option}: {card.name} is no block for feature maps. Known: {', '.join(MECHANISMS)}.")
        keys.append(card.name)
    if not keys:
        raise UserError(f"{option} is empty. Known: {', '.join(MECHANISMS)}.")
    return tuple(dict.fromkeys(keys))


def _backbone(name: str) -> str:
    timm = require("timm", extra="compare", purpose="visattn compare")
    import visattn.models  # noqa: F401  # it registers the papers' networks with timm

    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), "timm.list_models() lists them.")
        raise UserError(f"--backbone: timm has no model {name!r}. {hint}")
    return name


def resolved(settings: Settings) -> Settings:
    """Settings with names and device resolved, `at` and `output_stride` still as given.

    Raises:
        UserError: A setting that cannot be; the message names it.
    """
    if settings.task not in TASKS:
        raise UserError(f"--task must be one of {', '.join(TASKS)}, got {settings.task!r}.")
    pixels = settings.task == SEGMENTATION.name
    if pixels and settings.at:
        raise UserError("--at does not apply to --task segmentation: blocks go before the classifier of the head.")
    if not pixels and settings.output_stride is not None:
        raise UserError("--output-stride does not apply to --task classification. Leave it out.")
    stride = settings.output_stride
    if stride is not None and (stride < 1 or stride & (stride - 1)):
        raise UserError(f"--output-stride must be a power of 2 such as 4, 8 or 16, got {stride}.")
    for option, value in (("epochs", settings.epochs), ("seeds", settings.seeds)):
        if value < 1:
            raise UserError(f"--{option} must be 1 or more, got {value}.")
    if settings.batch_size < 2:
        raise UserError(f"--batch-size must be 2 or more, got {settings.batch_size}: BatchNorm needs two images.")
    if not (math.isfinite(settings.lr) and 0 < settings.lr <= 10):
        raise UserError(f"--lr must be above 0 and at most 10, got {settings.lr:g}.")
    if settings.precision not in PRECISIONS:
        raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}, got {settings.precision!r}.")
    mechanisms = known_mechanisms(settings.mechanisms)
    device = _device(settings.device)
    if settings.precision == "float16" and device == "cpu":
        raise UserError("--precision float16 needs a CUDA device. Use bfloat16 or float32 on the CPU.")
    backbone = _backbone(settings.backbone)
    return replace(settings, mechanisms=mechanisms, device=device, backbone=backbone)
