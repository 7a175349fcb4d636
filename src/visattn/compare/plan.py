"""A plan is data: everything that decides a run, settled before anything is trained or written."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import visattn
from visattn.compare.arms import (
    SEGMENTATION_PLACE,
    Arm,
    build_arm,
    build_backbone,
    choose_places,
    control_width,
    default_stride,
    head_channels,
    list_arms,
    widened_width,
)
from visattn.compare.settings import FORMAT, Settings, resolved
from visattn.compare.weights import Description
from visattn.data import Dataset, open_data
from visattn.errors import UserError, one_line, require
from visattn.profile import device_name
from visattn.surgery import Insertion, Place, find_places
from visattn.tasks import SEGMENTATION, Task, task_named

__all__ = ["Plan", "hardware", "make_plan", "open_plan", "sample_of", "versions"]

PACKAGES = ("timm", "torchvision", "lightning", "torchmetrics", "mlxtend", "safetensors")


@dataclass(frozen=True)
class Plan:
    """A comparison, resolved.

    Attributes:
        settings: With names, places and device resolved.
        data: The images.
        places: Where blocks go.
        arms: The contenders.
        control: Hidden channels of the control, see `build_arm`.
        refused: Arms that cannot be built, with the reason; they are reported, not trained.
        shapes: Names and shapes of the weights of each arm that can be built.
    """

    settings: Settings
    data: Dataset
    places: tuple[Place, ...]
    arms: tuple[Arm, ...]
    control: tuple[int, ...]
    refused: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict, repr=False)

    @property
    def task(self) -> Task:
        """What is asked of an image."""
        return task_named(self.data.task)

    def build(self, arm: Arm, seed: int) -> tuple[nn.Module, Insertion | None]:
        """The network of an arm; all arms of one seed share the backbone's weights bit for bit."""
        net = _backbone(self.settings, self.data, seed)
        return net, build_arm(
            net, arm, at=self.settings.at, sample=sample_of(self.data), seed=seed, control=self.control
        )

    def describe(self, arm: Arm) -> Description:
        """What is written beside the weights of an arm."""
        settings = self.settings
        return Description.of(
            self.data,
            backbone=settings.backbone,
            output_stride=settings.output_stride,
            arm=arm.name,
            at=settings.at,
            control=self.control,
        )

    def trials(self) -> list[tuple[Arm, int]]:
        """All trials, seed by seed, so that the first results compare all arms."""
        return [(arm, seed) for seed in range(self.settings.seeds) for arm in self.arms]

    def identity(self) -> dict[str, Any]:
        """What two runs must share to be one run."""
        return {
            **self.settings.record(),
            "dataset": {"train": len(self.data.train), "val": len(self.data.val)},
            "images": self.data.fingerprint,
        }

    def fingerprint(self) -> str:
        """Marks the files that belong to this run."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """The contents of `run.json`."""
        data = self.data
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint(),
            "identity": self.identity(),
            "command": self.settings.command(),
            "settings": self.settings.record(),
            "versions": versions(),
            "hardware": hardware(self.settings.device),
            "dataset": {
                "name": data.name,
                "description": data.description,
                "classes": list(data.classes),
                "train": len(data.train),
                "val": len(data.val),
                "image_size": list(data.image_size),
                "channels": data.channels,
                "unreadable": data.unreadable,
            },
            "places": [{"name": p.name, "shape": list(p.shape), "layout": p.layout} for p in self.places],
            "arms": [{"name": arm.name, "kind": arm.kind, "title": arm.title} for arm in self.arms],
            "notes": [],
        }


def sample_of(data: Dataset) -> Tensor:
    """Two validation images, on which shapes are found."""
    return data.val.batch(torch.arange(min(2, len(data.val))), seed=0, epoch=0)


def _backbone(settings: Settings, data: Dataset, seed: int) -> nn.Module:
    return build_backbone(
        settings.backbone,
        classes=len(data.classes),
        channels=data.channels,
        image_size=data.image_size,
        seed=seed,
        output_stride=settings.output_stride,
    )


def open_plan(settings: Settings) -> Plan:
    """Check settings and data and choose the places: a plan without arms. Writes nothing.

    Raises:
        UserError: Something is not fit to train on; one line with the remedy.
    """
    settings = resolved(settings)
    models = require("timm.models", extra="compare", purpose="visattn compare")
    cfg = models.get_pretrained_cfg(settings.backbone)
    data = open_data(
        settings.data,
        backbone_size=cfg.input_size[-1],
        fixed_size=bool(cfg.fixed_input_size),
        skip_unreadable=settings.skip_unreadable,
        task=settings.task,
    )
    pixels = data.task == SEGMENTATION.name
    if pixels and settings.output_stride is None:
        settings = replace(settings, output_stride=default_stride(settings.backbone, data.image_size))
    sample = sample_of(data)
    net = _backbone(settings, data, 0)
    at = (SEGMENTATION_PLACE,) if pixels else choose_places(net, sample, settings.at)
    settings = replace(settings, at=at)
    found = find_places(net, sample)
    return Plan(settings, data, tuple(found[name] for name in at), arms=(), control=())


def make_plan(settings: Settings) -> Plan:
    """Open a plan and try every arm. Writes nothing.

    Raises:
        UserError: Something is not fit to compare; one line with the remedy.
    """
    plan = open_plan(settings)
    at, arms = plan.settings.at, list_arms(plan.settings.mechanisms, plan.task)
    plan = replace(plan, arms=arms)
    largest: list[int] = []
    for arm in arms:
        if arm.kind == "control":
            if not largest:
                first, reason = next(iter(plan.refused.items()))
                raise UserError(f"--at: no mechanism fits {', '.join(at)}. {first}: {reason}")
            if plan.task is SEGMENTATION:
                plain, _ = plan.build(arms[0], 0)
                widths = [widened_width(head_channels(plain), len(plan.data.classes), largest[0])]
            else:
                widths = [control_width(p.channels, most) for p, most in zip(plan.places, largest, strict=True)]
            plan = replace(plan, control=tuple(widths))
        try:
            built, record = plan.build(arm, 0)
        except Exception as error:  # the block does not fit the place
            plan.refused[arm.name] = one_line(error)
            continue
        plan.shapes[arm.name] = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
        added = [place.parameters - 1 for place in record.places] if record else []  # less the gate
        largest = max(largest, added, key=sum)
    return plan


def versions() -> dict[str, str]:
    """Versions of everything that takes part."""
    found = {"visattn": visattn.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in PACKAGES:
        found[name] = str(require(name, extra="compare", purpose="visattn compare").__version__)
    return found


def hardware(device: str) -> dict[str, Any]:
    """The machine; on the CPU the number of threads decides the last bits of a result."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3 if hasattr(os, "sysconf") else None
    return {
        "device": device_name(torch.device(device)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory, 1),
        "system": platform.platform(terse=True),
    }
