"""The plots of the report as inline SVG, on Figure objects; matplotlib's settings differ only while one is drawn."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from visattn.compare.reading import Arm, Trial
from visattn.tasks import Task

__all__ = ["Look", "learning_curves", "looks", "score_against_latency", "ticks"]

# Colours that follow the reader's light or dark scheme: the page defines the variables.
_INK, _MUTED, _GRID = "#101112", "#707172", "#d0d1d2"
_PLAIN, _CONTROL = "#606162", "#202122"
_CSS = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _PLAIN: "var(--plain)",
    _CONTROL: "var(--control)",
}

# Okabe and Ito's palette without black and yellow (the neutral arms are grey; yellow fades on white).
_PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
_MARKERS = ("^", "D", "v", "P", "X", "p")

# Text stays text, and the same data give the same bytes.
_RC: Any = {"svg.fonttype": "none", "svg.hashsalt": "visattn", "text.usetex": False}

_FIRM, _SOFT = 1000.0, 0.3  # cost of a square point of a label over a marker or label, and over a thin line

_SMALL = 10.5  # text size in points at the width the figure is drawn for


@dataclass(frozen=True)
class Look:
    """How one arm is drawn in every figure."""

    colour: str
    marker: str

    @property
    def css(self) -> str:
        """The colour for a style sheet."""
        return _CSS.get(self.colour, self.colour)


@dataclass(frozen=True)
class _Label:
    """A text and the point it belongs to, in data coordinates; the point's line runs from `low` to `high`."""

    text: str
    colour: str
    x: float
    mean: float
    low: float
    high: float


def looks(arms: Sequence[Arm]) -> dict[str, Look]:
    """Colour and marker by arm: grey circle for plain, dark square for the control, a colour for each mechanism."""
    result = {}
    mechanisms = 0
    for arm in arms:
        if arm.kind == "mechanism":
            turn = mechanisms + mechanisms // len(_PALETTE)  # colours repeat with another marker
            result[arm.name] = Look(_PALETTE[mechanisms % len(_PALETTE)], _MARKERS[turn % len(_MARKERS)])
            mechanisms += 1
        else:
            result[arm.name] = Look(_PLAIN, "o") if arm.kind == "plain" else Look(_CONTROL, "s")
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round tick values inside a range."""
    return [float(value) for value in _round_steps(count).tick_values(low, high) if low <= value <= high]


def _round_steps(count: int, **options: Any) -> MaxNLocator:
    return MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], **options)


@mpl.rc_context(_RC)
def score_against_latency(arms: Sequence[Arm], batch: str, look: dict[str, Look], task: Task) -> str | None:
    """The main score against median latency, one labelled point per arm; None where fewer than two arms have both."""
    points = []
    for arm in arms:
        x = arm.cost.latency_ms.get(batch, (math.nan, math.nan))[0] if arm.cost else math.nan
        ys = [100 * trial.score for trial in arm.trials.values() if math.isfinite(trial.score)]
        if ys and math.isfinite(x) and x > 0:
            points.append((arm, x, ys))
    if len(points) < 2:
        return None
    figure, axes = _axes(width=4.8, height=4.2 + 0.15 * max(0, len(points) - 8))
    for arm, x, ys in points:
        colour, mean = look[arm.name].colour, sum(ys) / len(ys)
        axes.plot([x, x], [min(ys), max(ys)], color=colour, linewidth=1.5, alpha=0.45, solid_capstyle="round")
        axes.plot([x], [mean], look[arm.name].marker, color=colour, markersize=8, markeredgewidth=0)
    _scale(axes, [x for _, x, _ in points])
    axes.margins(x=0.06, y=0.1)
    left, right = axes.get_xlim()
    if axes.get_xscale() == "linear":
        axes.set_xlim(left, right + 0.35 * (right - left))  # room for the labels of the slowest arms
    axes.set_xlabel(f"latency, median of one batch of {batch} in ms", color=_MUTED, fontsize=_SMALL)
    axes.set_ylabel(f"{task.score} in %", color=_MUTED, fontsize=_SMALL)
    labels = [
        _Label(_short(arm.title), look[arm.name].colour, x, sum(ys) / len(ys), min(ys), max(ys))
        for arm, x, ys in points
    ]
    _place_labels(figure, axes, labels)
    means = "; ".join(f"{arm.title}: {x:.2f} ms, {sum(ys) / len(ys):.1f}%" for arm, x, ys in points)
    return _svg(figure, f"{task.heading} against median latency at batch {batch}. {means}.")


@mpl.rc_context(_RC)
def learning_curves(
    arm: Arm, plain: Arm, look: dict[str, Look], limits: tuple[float, float], last_epoch: int, task: Task
) -> str | None:
    """Validation score by epoch: mean over seeds and the band from lowest to highest, with plain behind it."""
    if not any(math.isfinite(epoch.val_score) for trial in arm.trials.values() for epoch in trial.epochs):
        return None
    figure, axes = _axes(width=3.1, height=2.0)
    for contender in (arm,) if arm is plain else (plain, arm):
        colour, front = look[contender.name].colour, contender is arm
        epochs, mean, low, high = _curve(list(contender.trials.values()))
        if front:
            axes.fill_between(epochs, low, high, color=colour, alpha=0.22, linewidth=0)
        style = "-" if len(epochs) > 2 else "o-"
        axes.plot(epochs, mean, style, color=colour, linewidth=2 if front else 1.3, markersize=4, zorder=2 + front)
    axes.set_ylim(*limits)
    axes.set_xlim(1 - 0.02 * last_epoch, last_epoch + 0.02 * last_epoch)
    axes.xaxis.set_major_locator(_round_steps(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(_round_steps(4))
    axes.set_xlabel("epoch", color=_MUTED, fontsize=_SMALL)
    axes.set_ylabel(f"{task.score} in %", color=_MUTED, fontsize=_SMALL)
    epochs, mean, _, _ = _curve(list(arm.trials.values()))
    text = f"Learning curve of {arm.title}: validation {task.score} {mean[0]:.1f}% after epoch {epochs[0]}"
    return _svg(figure, f"{text}, {mean[-1]:.1f}% after epoch {epochs[-1]}.")


def _curve(trials: Sequence[Trial]) -> tuple[list[int], list[float], list[float], list[float]]:
    by_epoch: dict[int, list[float]] = {}
    for trial in trials:
        for epoch in trial.epochs:
            if math.isfinite(epoch.val_score):
                by_epoch.setdefault(epoch.number, []).append(100 * epoch.val_score)
    epochs = sorted(by_epoch)
    values = [by_epoch[epoch] for epoch in epochs]
    return epochs, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=72, layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)
    axes.tick_params(colors=_MUTED, labelsize=_SMALL, length=0, pad=5)
    return figure, axes


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if max(values) > 20 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(_round_steps(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(_round_steps(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _short(text: str) -> str:
    """A label of at most two narrow lines."""
    return "\n".join(textwrap.wrap(text, 17, max_lines=2, placeholder="…"))


def _place_labels(figure: Figure, axes: Axes, points: Sequence[_Label]) -> None:
    """Put every label at the free spot nearest to its point; a thin line leads to one that had to move away."""
    figure.canvas.draw()  # the layout settles where a data coordinate is on the page, and stays
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    centres = axes.transData.transform([(point.x, point.mean) for point in points])
    taken = []
    for point, (x, y) in zip(points, centres, strict=True):
        bottom, top = (float(axes.transData.transform((point.x, end))[1]) for end in (point.low, point.high))
        taken += [(x - 7, y - 6, x + 7, y + 6, _FIRM), (x - 1, bottom, x + 1, top, _SOFT)]
    for turn in np.argsort(-centres[:, 0]):  # the slowest first: they have the least room
        point, (x, y) = points[turn], centres[turn]
        text = axes.text(0, 0, point.text, fontsize=_SMALL, color=_INK, parse_math=False, va="bottom", linespacing=1.05)
        text.set_in_layout(False)
        size = text.get_window_extent(renderer)
        others = np.delete(centres, turn, axis=0)
        left, bottom = _free_spot((x, y), (size.width, size.height), frame, np.array(taken), others)
        text.set_transform(None)
        text.set_position((left, bottom))
        taken.append((left, bottom, left + size.width, bottom + size.height, _FIRM))
        end = (min(max(x, left - 2), left + size.width + 2), min(max(y, bottom + 3), bottom + size.height - 3))
        if math.hypot(end[0] - x, end[1] - y) > 12:
            line = axes.plot([x, end[0]], [y, end[1]], color=point.colour, linewidth=0.8, zorder=1, transform=None)[0]
            line.set_in_layout(False)
            for step in np.linspace(0.3, 1, 9):
                at = (x + (end[0] - x) * step, y + (end[1] - y) * step)
                taken.append((*at, at[0] + 1, at[1] + 1, _SOFT))


def _free_spot(
    point: tuple[float, float],
    size: tuple[float, float],
    frame: Bbox,
    taken: npt.NDArray[np.float64],
    others: npt.NDArray[np.float64],
) -> tuple[float, float]:
    """Left and bottom of the free box of this size that is near its point and not nearer to another one."""
    grid = np.meshgrid(np.arange(frame.x0, frame.x1 - size[0], 2.0), np.arange(frame.y0 + 2, frame.y1 - size[1], 2.0))
    left, bottom = grid[0].ravel(), grid[1].ravel()
    right, top = left + size[0], bottom + size[1]

    def distance(x: float, y: float) -> npt.NDArray[np.float64]:
        across = np.maximum(0, np.maximum(left - x, x - right))
        return np.hypot(across, np.maximum(0, np.maximum(bottom + 4 - y, y - top + 4)))

    own = distance(*point)
    cost = own + 0.15 * abs(bottom + size[1] / 2 - point[1]) + 2.0 * (left < point[0])  # beside it, to the right first
    for x, y in others:
        cost += 0.8 * np.clip(own + 12 - distance(x, y), 0, None)
    for x0, y0, x1, y1, weight in taken:
        width = np.clip(np.minimum(right + 2, x1) - np.maximum(left - 2, x0), 0, None)
        cost += weight * width * np.clip(np.minimum(top, y1) - np.maximum(bottom, y0), 0, None)
    best = int(np.argmin(cost))
    return float(left[best]), float(bottom[best])


def _svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element that takes text font and scheme colours from the page around it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL))  # ids repeat on the page
    for sentinel, variable in _CSS.items():
        svg = svg.replace(sentinel, variable)
    width, height = (round(72 * float(side)) for side in figure.get_size_inches())
    head = f'<svg role="img" aria-label="{escape(description)}" viewBox="0 0 {width} {height}" class="plot"'
    return re.sub(r"<svg[^>]*>", f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1)
