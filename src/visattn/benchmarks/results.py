"""The file of results: its rows, its schema, its name, and what they come to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visattn.errors import UserError
from visattn.writing import writable, write_text

__all__ = ["FORMAT", "SCHEMA", "Row", "Summary", "file_name", "read", "summarise", "target", "validate", "write"]

FORMAT = 1
OURS = "visattn"
VERDICTS = ("equal", "NOT EQUAL", "unverified", "failed", "speed only")


@dataclass
class Row:
    """One contender at one shape in one mode; what was not measured is None.

    Attributes:
        shape: Label of the shape.
        mechanism: Its mechanism.
        block: Its block.
        size: Of the input, without the batch.
        batch: Inputs in a call.
        mode: "inference" or "training".
        contender: "visattn", "fused", "reference", "compiled" or the name of a peer.
        verdict: One of `VERDICTS`; a peer computes another function, so its speed alone is told.
        reason: Why it is not equal, unverified or failed.
        budget_used: Largest share of the permitted deviation.
        median_ms: Of the runs.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        runs: How many were timed.
        peak_mib: Most memory allocated during a call, beyond inputs and parameters.
        gflop: 10^9 FLOPs of a call.
        parameters: Trained values.
        ratio: Median of the reference by this median: above 1 is faster.
        limit_ms: What the task takes at least at the machine's measured rates.
        percent_of_limit: That by the median, in percent.
    """

    shape: str
    mechanism: str
    block: str
    size: list[int]
    batch: int
    mode: str
    contender: str
    verdict: str = "unverified"
    reason: str = ""
    budget_used: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    runs: int = 0
    peak_mib: float | None = None
    gflop: float | None = None
    parameters: int | None = None
    ratio: float | None = None
    limit_ms: float | None = None
    percent_of_limit: float | None = None


@dataclass
class Summary:
    """How one contender of ours stands against another over the shapes of a mode.

    Attributes:
        mode: "inference" or "training".
        contender: Ours.
        against: The other.
        geometric_mean: Of (the other's median / ours): above 1 is faster.
        shapes: How many both have a time for.
        worst: The shape with the least ratio.
        worst_ratio: That ratio.
    """

    mode: str
    contender: str
    against: str
    geometric_mean: float
    shapes: int
    worst: str
    worst_ratio: float


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Compare what is ours with the reference and the compiler, mode by mode, where both have a time."""
    times: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.median_ms is not None:
            times.setdefault(row.mode, {}).setdefault(row.contender, {})[row.shape] = row.median_ms
    found = []
    for mode, by_contender in times.items():
        for ours in (OURS, "fused"):
            for other in ("reference", "compiled"):
                mine, theirs = by_contender.get(ours, {}), by_contender.get(other, {})
                ratios = {shape: theirs[shape] / mine[shape] for shape in mine if shape in theirs}
                if ratios:
                    worst = min(ratios, key=lambda shape: ratios[shape])
                    mean = geometric_mean(list(ratios.values()))
                    found.append(Summary(mode, ours, other, mean, len(ratios), worst, ratios[worst]))
    return found


# ---- the file -------------------------------------------------------------------------------------------------------

_NUMBER = (float, int, None)
_WORDS = [str]
SCHEMA: dict[str, Any] = {
    "format": int,
    "date": str,
    "commit": (str, None),
    "versions": {"visattn": str, "torch": str, "python": str},
    "machine": {
        "device": str,
        "name": str,
        "system": str,
        "threads": int,
        "gemm_gflops": float,
        "copy_gbps": float,
        "kernels": bool,
    },
    "settings": {"names": _WORDS, "shapes": str, "dtype": str, "modes": _WORDS, "against": _WORDS, "gate": bool},
    "rows": [
        {
            "shape": str,
            "mechanism": str,
            "block": str,
            "size": [int],
            "batch": int,
            "mode": str,
            "contender": str,
            "verdict": str,
            "reason": str,
            "budget_used": _NUMBER,
            "median_ms": _NUMBER,
            "p20_ms": _NUMBER,
            "p80_ms": _NUMBER,
            "runs": int,
            "peak_mib": _NUMBER,
            "gflop": _NUMBER,
            "parameters": (int, None),
            "ratio": _NUMBER,
            "limit_ms": _NUMBER,
            "percent_of_limit": _NUMBER,
        }
    ],
    "summary": [
        {
            "mode": str,
            "contender": str,
            "against": str,
            "geometric_mean": float,
            "shapes": int,
            "worst": str,
            "worst_ratio": float,
        }
    ],
    "skipped": [{"contender": str, "reason": str}],
    "memory_note": str,
}


def validate(content: Any) -> None:
    """Hold results against the schema: every key, no other, every type, known verdicts, times in order.

    Raises:
        ValueError: Something differs; the message says where.
    """
    _check(content, SCHEMA, "results")
    if content["format"] != FORMAT:
        raise ValueError(f"results.format is {content['format']}, known is {FORMAT}")
    for index, row in enumerate(content["rows"]):
        where = f"results.rows[{index}]"
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"{where}.verdict is {row['verdict']!r}, known are {', '.join(VERDICTS)}")
        times = [row[key] for key in ("p20_ms", "median_ms", "p80_ms")]
        given = [time for time in times if time is not None]
        if len(given) not in (0, 3) or given != sorted(given):
            raise ValueError(f"{where}: p20, median and p80 are out of order")


def _check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no object")
        for key in sorted(schema.keys() ^ value.keys()):
            raise ValueError(f"{where} {'lacks' if key in schema else 'has an unknown key'} {key!r}")
        for key, inner in schema.items():
            _check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        for index, entry in enumerate(value):
            _check(entry, schema[0], f"{where}[{index}]")
    else:
        allowed = schema if isinstance(schema, tuple) else (schema,)
        if not any(value is None if kind is None else type(value) is kind for kind in allowed):
            names = " or ".join("null" if kind is None else kind.__name__ for kind in allowed)
            raise ValueError(f"{where} is {value!r}, not {names}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} is {value!r}, not finite")


def file_name(device: str, date: str, dtype: str) -> str:
    """The name of a file of results, such as `amd-epyc-2026-01-31.json`; another precision than float32 is in it."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-{date}{'' if dtype == 'float32' else f'-{dtype}'}.json"


def target(path: Path, name: str) -> Path:
    """The file to write: `path`, or `name` in it where it is a folder; asked before any work.

    Raises:
        UserError: It cannot be written.
    """
    return writable(path / name if path.is_dir() else path)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write results that fit the schema, whole or not at all."""
    validate(content)
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Results from a file.

    Raises:
        UserError: It cannot be read, or it does not fit the schema.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        validate(content)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no results of visattn bench ({error})") from error
    return content


def record(row: Row | Summary) -> dict[str, Any]:
    """As JSON; a number that is not finite becomes null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(row).items()
    }
