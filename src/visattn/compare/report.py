"""The report of a comparison: results.csv, report.md and one self-contained report.html from the run folder alone."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visattn.compare.classes import class_means, class_names, class_table, detail_mean
from visattn.compare.reading import Arm, Run, read_run
from visattn.compare.statistics import LEVEL, Interval
from visattn.compare.summary import Summary, answer, limits, summarise
from visattn.compare.verdicts import number, signed
from visattn.errors import require
from visattn.tasks import SEGMENTATION, Task
from visattn.writing import write_text

__all__ = ["write_report"]

BATCHES = ("1", "32")
NOTHING = "\N{EN DASH}"  # an empty cell
MIOU_CONVENTION = (
    "mIoU: intersection over union of a class, over all validation images together, mean over the classes that occur"
)
FLOPS_CONVENTION = "FLOPs: one image, forward pass, one multiply-add counted as 2"


def write_report(run_dir: Path) -> Path:
    """Write results.csv, report.md and report.html into a run folder, from what the folder holds.

    Each file is written whole or not at all; a half-finished run is reported as far as it got.

    Args:
        run_dir: The folder `visattn compare` wrote.

    Returns:
        The path of report.html.

    Raises:
        UserError: The folder is none of ours, a file in it cannot be used, or a needed package is not installed.
    """
    for module in ("jinja2", "matplotlib", "numpy", "PIL", "scipy.special"):
        require(module, extra="compare", purpose="the report")
    run = read_run(run_dir)
    summaries = summarise(run)
    contents = {
        "results.csv": _csv(run, summaries),
        "report.md": _render("report.md.jinja", run, summaries),
        "report.html": _render("report.html.jinja", run, summaries, **_drawings(run, summaries)),
    }
    for name, content in contents.items():
        write_text(run_dir / name, content)
    return run_dir / "report.html"


def _csv(run: Run, summaries: Sequence[Summary]) -> str:
    """One line per arm; scores in percent, differences in points, empty where there is no number."""
    lines = []
    classes = class_names(run)
    for summary in summaries:
        arm, cost = summary.arm, summary.arm.cost
        line: dict[str, object] = {
            "arm": arm.name,
            "kind": arm.kind,
            "seeds_finished": summary.score.count,
            "seeds_planned": len(run.seeds),
            **_columns(f"{run.task.key}_percent", summary.score),
            **_columns("points_over_plain", summary.plain),
            **_columns("points_over_control", summary.control),
            "parameters": cost.parameters if cost else None,
            "added_parameters": cost.added_parameters if cost else None,
            "flops_per_image": cost.flops if cost else None,
            "train_seconds_mean": summary.seconds,
        }
        for batch in BATCHES:
            p50, p90 = cost.latency_ms.get(batch, (None, None)) if cost else (None, None)
            line |= {f"latency_ms_batch{batch}_p50": p50, f"latency_ms_batch{batch}_p90": p90}
        line["peak_memory_mib"] = cost.peak_memory_mib if cost else None
        line |= {
            f"{run.task.key}_percent_seed{seed}": 100 * arm.trials[seed].score if seed in arm.trials else None
            for seed in run.seeds
        }
        if run.task is SEGMENTATION:
            line["pixel_accuracy_percent_mean"] = 100 * detail_mean(arm, "pixel_accuracy")
            means = class_means(arm, len(classes))
            line |= {f"iou_percent_mean_{name}": value for name, value in zip(classes, means, strict=True)}
        line |= {"verdict": summary.verdict, "problems": "; ".join(summary.problems)}
        lines.append({key: _csv_value(value) for key, value in line.items()})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _columns(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {f"{name}_mean": None, f"{name}_low": None, f"{name}_high": None}
    return {f"{name}_mean": interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _csv_value(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) and not value.is_integer() else _whole(value)
    return "" if value is None else value


def _whole(value: float) -> str:
    return str(int(value)) if math.isfinite(value) else ""


@dataclass(frozen=True)
class _Row:
    """One arm in the table of results: its summary and, for every cell, the value and a second line."""

    summary: Summary
    cells: tuple[tuple[str, str], ...]


COLUMNS = (
    ("Over plain", "points, 95% CI"),
    ("Over control", "points, 95% CI"),
    ("Seeds", "finished"),
    ("Parameters", "in all"),
    ("FLOPs", "per image"),
    ("Training", "per seed"),
    ("Latency, batch 1", "p50, p90, ms"),
    ("Latency, batch 32", "p50, p90, ms"),
    ("Peak memory", "MiB"),
)


def _column_heads(task: Task) -> tuple[tuple[str, str], ...]:
    """The columns of the table of results, a title and what is in them."""
    pixels = (("Pixel accuracy", "%, mean"),) if task is SEGMENTATION else ()
    return ((task.heading, "%, 95% CI"), *COLUMNS[:2], *pixels, *COLUMNS[2:])


def _rows(run: Run, summaries: Sequence[Summary]) -> list[_Row]:
    rows = []
    for summary in summaries:
        cost = summary.arm.cost
        latencies = [cost.latency_ms.get(batch, (math.nan, math.nan)) if cost else (math.nan,) * 2 for batch in BATCHES]
        pixels = 100 * detail_mean(summary.arm, "pixel_accuracy")
        cells = (
            _score(summary),
            _difference(summary.plain),
            _difference(summary.control),
            *([(f"{pixels:.1f}" if math.isfinite(pixels) else NOTHING, "")] if run.task is SEGMENTATION else []),
            (f"{summary.score.count} of {len(run.seeds)}", ""),
            (_amount(cost.parameters if cost else math.nan), ""),
            (_amount(cost.flops if cost else math.nan), ""),
            (_duration(summary.seconds), ""),
            *((_figure(p50), f"p90 {_figure(p90)}" if math.isfinite(p90) else "") for p50, p90 in latencies),
            (_figure(cost.peak_memory_mib if cost else math.nan), ""),
        )
        rows.append(_Row(summary, cells))
    return rows


def _score(summary: Summary) -> tuple[str, str]:
    score = summary.score
    if score.count == 0:
        return ("failed" if summary.arm.failures else NOTHING), ""
    if score.low is None:
        return f"{score.mean:.1f}", "one seed, no CI" if score.count == 1 else "no spread, no CI"
    return f"{score.mean:.1f}", f"± {number(score.mean - score.low)}"


def _difference(interval: Interval | None) -> tuple[str, str]:
    if interval is None or interval.count == 0:
        return NOTHING, ""
    if interval.low is None or interval.high is None:
        return signed(interval.mean), "no CI"
    return signed(interval.mean), f"{signed(interval.low)} to {signed(interval.high)}"


def _amount(value: float) -> str:
    if not math.isfinite(value):
        return NOTHING
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:g}"


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return NOTHING
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _settings(values: dict[str, Any]) -> dict[str, str]:
    return {str(key).replace("_gib", ", GiB").replace("_", " "): _setting(value) for key, value in values.items()}


def _setting(value: object) -> str:
    if isinstance(value, list) and all(isinstance(part, str | int | float) for part in value):
        return ", ".join(str(part) for part in value)
    if value is None:
        return "not set"
    return str(value) if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def _markdown(text: object) -> str:
    """Text that Markdown shows as it is, in one line."""
    line = " ".join(str(text).split()).replace("&", "&amp;")
    return re.sub(r"([\\`*<>|\[\]~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", line)


def _render(template: str, run: Run, summaries: list[Summary], **extra: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("visattn.compare", "templates"),
        autoescape=template.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _markdown
    return environment.get_template(template).render(
        run=run,
        summaries=summaries,
        answer=answer(run, summaries),
        limits=limits(run, summaries),
        columns=_column_heads(run.task),
        class_rows=class_table(run) if run.task is SEGMENTATION else [],
        rows=_rows(run, summaries),
        conventions=([MIOU_CONVENTION] if run.task is SEGMENTATION else []) + [FLOPS_CONVENTION],
        memory_notes=sorted({a.cost.peak_memory_note for a in run.arms if a.cost and a.cost.peak_memory_note}),
        settings=_settings(run.settings),
        versions=_settings(run.versions),
        hardware=_settings(run.hardware),
        dataset=_dataset(run.dataset),
        planned=len(run.arms) * len(run.seeds),
        finished=sum(summary.score.count for summary in summaries),
        level=f"{100 * LEVEL:.0f}%",
        **extra,
    )


def _dataset(dataset: dict[str, Any]) -> dict[str, str]:
    """What is known about the data, worded for a table."""
    rows = {"name": dataset.get("name"), "what it is": dataset.get("description")}
    if dataset.get("train") is not None:
        rows["images"] = f"{dataset['train']} for training, {dataset.get('val', '?')} for validation"
    if isinstance(dataset.get("image_size"), list):
        size = " x ".join(str(side) for side in dataset["image_size"])
        rows["image size"] = f"{size}, {_channels(dataset['channels'])}" if dataset.get("channels") else size
    classes = dataset.get("classes")
    if isinstance(classes, list) and classes:
        listed = ", ".join(str(name) for name in classes[:20])
        rows["classes"] = f"{len(classes)}: {listed}{', …' if len(classes) > 20 else ''}"
    if dataset.get("unreadable"):
        rows["unreadable images left out"] = dataset["unreadable"]
    return {key: str(value) for key, value in rows.items() if value is not None}


def _channels(count: object) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class _Strip:
    """Positions in percent of one horizontal strip."""

    low: float | None
    mean: float
    high: float | None
    dots: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Scale:
    """A horizontal axis shared by several strips, in percent of its width."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def strip(self, interval: Interval | None, dots: Sequence[float] = ()) -> _Strip | None:
        if interval is None or interval.count == 0:
            return None
        low, high = (None if end is None else self.at(end) for end in (interval.low, interval.high))
        return _Strip(low, self.at(interval.mean), high, tuple(self.at(dot) for dot in dots))


def _scale(values: Sequence[float]) -> _Scale | None:
    """An axis around all values and zero; None where there is no value."""
    from visattn.compare.figures import ticks

    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(0.0, *finite), max(0.0, *finite)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    scale = _Scale(low, high, ())
    return _Scale(low, high, tuple((scale.at(tick), f"{tick:+g}" if tick else "0") for tick in ticks(low, high)))


def _drawings(run: Run, summaries: Sequence[Summary]) -> dict[str, Any]:
    """Everything drawn: strips, plots and example images."""
    from markupsafe import Markup

    from visattn.compare import attended, figures, predicted

    look = figures.looks(run.arms)
    intervals = [interval for s in summaries for interval in (s.plain, s.control) if interval and interval.count]
    ends = [end for interval in intervals for end in (interval.low, interval.mean, interval.high) if end is not None]
    scale = _scale(ends)
    latency = [figures.score_against_latency(run.arms, batch, look, run.task) for batch in BATCHES]
    plain = next(arm for arm in run.arms if arm.kind == "plain")
    span, last = _curve_frame(run)
    curves = [(arm, figures.learning_curves(arm, plain, look, span, last, run.task)) for arm in run.arms]
    shown = attended.attended(run.arms, run.dataset.get("classes") or [])
    gates, gate_scale = _gates(run.arms)
    masks = predicted.predicted(run) if run.task is SEGMENTATION else None
    return {
        "look": look,
        "scale": scale,
        "strips": {s.arm.name: (scale.strip(s.plain), scale.strip(s.control)) for s in summaries} if scale else {},
        "latency": [Markup(svg) for svg in latency if svg],
        "curves": [(arm, Markup(svg)) for arm, svg in curves if svg],
        "gates": gates,
        "gate_scale": gate_scale,
        "shown": shown,
        "masks": masks,
        "pictures": attended.pictures(shown, masks.pictures if masks else ()),
        "attended_places": attended.PLACES,
        "css": Markup((Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")),
    }


def _curve_frame(run: Run) -> tuple[tuple[float, float], int]:
    """One frame for all learning curves, so that they can be compared."""
    epochs = [epoch for arm in run.arms for trial in arm.trials.values() for epoch in trial.epochs]
    values = [100 * epoch.val_score for epoch in epochs if math.isfinite(epoch.val_score)]
    if not values:
        return (0.0, 100.0), 1
    margin = 0.05 * (max(values) - min(values)) or 1.0
    return (min(values) - margin, max(values) + margin), max(epoch.number for epoch in epochs)


def _gates(arms: Sequence[Arm]) -> tuple[list[tuple[Arm, str, float, _Strip]], _Scale | None]:
    """Mean gate over seeds by arm and place, on one axis."""
    found: list[tuple[Arm, str, list[float]]] = []
    for arm in arms:
        for place in dict.fromkeys(place for trial in arm.trials.values() for place in trial.gates):
            values = [trial.gates[place] for trial in arm.trials.values() if place in trial.gates]
            found.append((arm, place, [value for value in values if math.isfinite(value)]))
    scale = _scale([value for _, _, values in found for value in values])
    rows = []
    for arm, place, values in found:
        if scale is not None and values:
            mean = math.fsum(values) / len(values)
            rows.append((arm, place, mean, _Strip(scale.at(min(values)), scale.at(mean), scale.at(max(values)))))
    return rows, scale
