"""Reading a finished or half-finished run folder; whatever is wrong with it is said with the file's name."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from visattn.compare.settings import FORMAT
from visattn.errors import UserError
from visattn.tasks import SEGMENTATION, TASKS, Task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Arm", "Cost", "Epoch", "Examples", "Run", "Trial", "read_run"]

ARM_KINDS = ("plain", "mechanism", "control")

_AGAIN = "Delete it and run the same command again to write it anew"
_ELSEWHERE = "Give a folder that `visattn compare --out` wrote"


@dataclass(frozen=True)
class Epoch:
    """One line of a learning curve."""

    number: int
    val_score: float


@dataclass(frozen=True)
class Trial:
    """One finished training; `details` holds further scores, one number each or one for each class."""

    seed: int
    score: float
    details: dict[str, tuple[float, ...]]
    seconds: float
    epochs: tuple[Epoch, ...]
    gates: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """What one arm costs; NaN where a number was not measured, `failed` where the measurement broke."""

    parameters: float
    added_parameters: float
    flops: float
    latency_ms: dict[str, tuple[float, float]]
    peak_memory_mib: float
    peak_memory_note: str
    failed: str


@dataclass(frozen=True)
class Examples:
    """A few validation images, what the arm said and where it looked, by (place, kind); (n,) classes or (n, H, W)."""

    seed: int
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]
    predictions: npt.NDArray[Any]
    query: tuple[float, float]
    maps: dict[tuple[str, str], npt.NDArray[Any]]


@dataclass(frozen=True)
class Arm:
    """One contender with everything the folder holds about it."""

    name: str
    kind: str
    title: str
    trials: dict[int, Trial]
    failures: dict[int, str]
    cost: Cost | None
    examples: Examples | None


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    folder: Path
    task: Task
    command: str
    settings: dict[str, Any]
    versions: dict[str, Any]
    hardware: dict[str, Any]
    dataset: dict[str, Any]
    places: list[dict[str, Any]]
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    notes: list[str]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Args:
        folder: The folder `visattn compare` wrote.

    Raises:
        UserError: The folder is none of ours, or a file in it cannot be used; the message names the file.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"report: a run folder must hold run.json, got {folder}. {_ELSEWHERE}.")
    data = _File(path, _ELSEWHERE)
    if data.content.get("format") != FORMAT:
        raise UserError(
            f"report: {path} must have format {FORMAT}, got format={data.content.get('format')!r}. {_ELSEWHERE}."
        )
    settings = cast(dict[str, Any], data.get("settings", dict))
    seeds = settings.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise data.error(f"settings.seeds must be a list of whole numbers, got {seeds!r}")
    if settings.get("task") not in TASKS:
        raise data.error(f"settings.task must be one of {', '.join(TASKS)}, got {settings.get('task')!r}")
    task = TASKS[settings["task"]]
    arms = []
    for entry in data.get("arms", list):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or entry.get("kind") not in ARM_KINDS:
            raise data.error(f"every arm must have a name and a kind of {', '.join(ARM_KINDS)}, got {entry!r}")
        arms.append(_read_arm(folder, entry, seeds, task))
    if [arm.kind for arm in arms].count("plain") != 1:
        raise data.error("there must be exactly one plain arm")
    places = data.get("places", list)
    if not all(isinstance(place, dict) and isinstance(place.get("name"), str) for place in places):
        raise data.error(f"every place must have a name, got {places!r}")
    return Run(
        folder=folder,
        task=task,
        command=cast(str, data.get("command", str)),
        settings=settings,
        versions=cast(dict[str, Any], data.get("versions", dict)),
        hardware=cast(dict[str, Any], data.get("hardware", dict)),
        dataset=cast(dict[str, Any], data.get("dataset", dict)),
        places=places,
        seeds=tuple(seeds),
        arms=tuple(arms),
        notes=[str(note) for note in data.get("notes", list)],
    )


class _File:
    """One JSON file; every complaint carries its name."""

    def __init__(self, path: Path, remedy: str = _AGAIN) -> None:
        self.path = path
        self.remedy = remedy
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.error(f"it cannot be read ({str(error).splitlines()[0]})") from error
        if not isinstance(content, dict):
            raise self.error(f"it must hold a JSON object, got {type(content).__name__}")
        self.content: dict[str, Any] = content

    def error(self, what: str) -> UserError:
        return UserError(f"report: {self.path} cannot be used: {' '.join(what.split())}. {self.remedy}.")

    def get(self, key: str, kind: type) -> Any:
        value = self.content.get(key)
        if not isinstance(value, kind):
            raise self.error(f"`{key}` must be a {kind.__name__}, got {value!r}")
        return value

    def number(self, value: object, key: str) -> float:
        """A number; null and a missing key mean not measured."""
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"`{key}` must be a number, got {value!r}")
        return float(value)


def _read_arm(folder: Path, entry: Mapping[str, Any], seeds: list[int], task: Task) -> Arm:
    name = str(entry["name"])
    trials: dict[int, Trial] = {}
    failures: dict[int, str] = {}
    examples: Examples | None = None
    for seed in seeds:
        trial = folder / "trials" / f"{name}-seed{seed}"
        failure = folder / "failures" / f"{name}-seed{seed}.json"
        if trial.is_dir():
            trials[seed] = _read_trial(trial / "result.json", seed)
            if examples is None and (trial / "examples.npz").exists():
                examples = _read_examples(trial / "examples.npz", seed, task)
        elif failure.exists():
            failures[seed] = str(_File(failure).get("reason", str))
    cost = folder / "costs" / f"{name}.json"
    return Arm(
        name=name,
        kind=str(entry["kind"]),
        title=str(entry.get("title") or name),
        trials=trials,
        failures=failures,
        cost=_read_cost(cost) if cost.exists() else None,
        examples=examples,
    )


def _read_trial(path: Path, seed: int) -> Trial:
    data = _File(path, "Delete its folder and run the same command again to repeat the trial")
    epochs = []
    for line in data.get("epochs", list):
        if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
            raise data.error(f"every entry of `epochs` must have a whole number `epoch`, got {line!r}")
        epochs.append(Epoch(line["epoch"], data.number(line.get("val_score"), "val_score")))
    gates = data.content.get("gates") or {}
    if not isinstance(gates, dict):
        raise data.error(f"`gates` must be a dict, got {gates!r}")
    details = data.content.get("details") or {}
    if not isinstance(details, dict):
        raise data.error(f"`details` must be a dict, got {details!r}")
    return Trial(
        seed=seed,
        score=data.number(data.content.get("score"), "score"),
        details={
            str(key): tuple(data.number(part, "details") for part in (value if isinstance(value, list) else [value]))
            for key, value in details.items()
        },
        seconds=data.number(data.content.get("seconds"), "seconds"),
        epochs=tuple(epochs),
        gates={str(place): data.number(gate, "gates") for place, gate in gates.items()},
    )


def _read_cost(path: Path) -> Cost:
    data = _File(path)
    latency = data.content.get("latency_ms") or {}
    if not isinstance(latency, dict) or not all(isinstance(entry, dict) for entry in latency.values()):
        raise data.error(f"`latency_ms` must hold p50 and p90 by batch size, got {latency!r}")

    def number(key: str) -> float:
        return data.number(data.content.get(key), key)

    return Cost(
        parameters=number("parameters"),
        added_parameters=number("added_parameters"),
        flops=number("flops"),
        latency_ms={
            str(batch): (data.number(entry.get("p50"), "p50"), data.number(entry.get("p90"), "p90"))
            for batch, entry in latency.items()
        },
        peak_memory_mib=number("peak_memory_mib"),
        peak_memory_note=str(data.content.get("peak_memory_note") or ""),
        failed=str(data.content.get("failed") or ""),
    )


def _read_examples(path: Path, seed: int, task: Task) -> Examples:
    import numpy as np

    def broken(what: str) -> UserError:
        return UserError(f"report: {path} cannot be used: {' '.join(what.split())}. {_AGAIN}, or do without examples.")

    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        images, labels, predictions = (arrays.pop(key) for key in ("images", "labels", "predictions"))
        query = arrays.pop("query", np.array([0.5, 0.5]))
    except KeyError as error:
        raise broken(f"it has no array {error}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise broken(f"it cannot be read ({error})") from error
    count = len(images)
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise broken(f"images must be uint8 of shape (n, H, W) or (n, H, W, 3), got {images.dtype} {images.shape}")
    expected = images.shape[:3] if task is SEGMENTATION else (count,)
    if labels.shape != expected or predictions.shape != expected or query.shape != (2,):
        raise broken(f"labels, predictions and query must have shapes {expected}, {expected} and (2,)")
    maps = {}
    for key, array in arrays.items():
        place, _, kind = key.rpartition("|")
        dims = {"position": (3,), "slot": (3,), "branch": (2,), "channel": (2, 3)}.get(kind, ())
        if array.ndim not in dims or len(array) != count or array.size == 0:
            raise broken(f"array {key!r} must be <place>|<kind> with {count} maps, got shape {array.shape}")
        maps[place, kind] = array.astype(np.float64)
    return Examples(
        seed=seed,
        images=images,
        labels=labels.astype(np.int64),
        predictions=predictions.astype(np.int64),
        query=(float(query[0]), float(query[1])),
        maps=maps,
    )
