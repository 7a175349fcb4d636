"""Scores of segmentation beside the main one: pixel accuracy and the IoU of each class."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from visattn.colours import hex_code, palette
from visattn.compare.reading import Arm, Run

__all__ = ["ClassRow", "class_means", "class_names", "class_table", "detail_mean"]

STRONGEST = 55  # of 100, the colour of the largest difference in the table
LEAST = 5.0  # points that take the full colour where all differences are smaller


def class_names(run: Run) -> list[str]:
    """Names of the classes, by label."""
    return [str(name) for name in run.dataset.get("classes") or []]


def _mean(values: Iterable[float]) -> float:
    """Mean of the numbers among values; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def detail_mean(arm: Arm, name: str) -> float:
    """Mean over seeds of one further score, from 0 to 1; NaN where no trial has it."""
    return _mean(trial.details[name][0] for trial in arm.trials.values() if name in trial.details)


def class_means(arm: Arm, count: int) -> list[float]:
    """IoU of each class in percent, mean over the seeds in which the class occurred; NaN where there is none."""
    found = [trial.details.get("iou", ()) for trial in arm.trials.values()]
    return [_mean(100 * iou[label] for iou in found if len(iou) > label) for label in range(count)]


@dataclass(frozen=True)
class Cell:
    """IoU of one class in one arm: in words, and how far it is from plain."""

    text: str
    difference: str
    style: str


@dataclass(frozen=True)
class ClassRow:
    """One class: its name, its colour in masks, and a cell for each arm."""

    name: str
    colour: str
    cells: tuple[Cell, ...]


def class_table(run: Run) -> list[ClassRow]:
    """IoU by class and arm; cells are coloured by their difference to plain.

    Full colour is the largest difference of all, or `LEAST`: tenths of a point, all chance, are not to shine.
    """
    classes = class_names(run)
    means = {arm.name: class_means(arm, len(classes)) for arm in run.arms}
    plain = next(means[arm.name] for arm in run.arms if arm.kind == "plain")
    if not any(math.isfinite(value) for values in means.values() for value in values):
        return []
    gaps = {name: [value - base for value, base in zip(values, plain, strict=True)] for name, values in means.items()}
    largest = max([LEAST, *(abs(gap) for some in gaps.values() for gap in some if math.isfinite(gap))])

    def cell(arm: Arm, label: int) -> Cell:
        value, gap = means[arm.name][label], gaps[arm.name][label]
        if not math.isfinite(value):
            return Cell("\N{EN DASH}", "", "")
        if arm.kind == "plain" or not math.isfinite(gap):
            return Cell(f"{value:.1f}", "", "")
        share = round(STRONGEST * abs(gap) / largest)
        tint = f"background: color-mix(in srgb, var(--{'up' if gap > 0 else 'down'}) {share}%, transparent)"
        return Cell(f"{value:.1f}", f"{gap:+.1f}", tint if share else "")

    colours = palette(len(classes))
    return [
        ClassRow(name, hex_code(colours[label]), tuple(cell(arm, label) for arm in run.arms))
        for label, name in enumerate(classes)
    ]
