"""Recorded cases: a `.json` that says what was run, beside a `.npz` of what came out.

Keys of the json (all but `sampled` and `notes` are required):

- `mechanism`, `case`: names.
- `source`: `repo`, `commit`, `file`, `class` of the published code.
- `constructor`: keyword arguments of the published class; a class stands as its dotted name.
- `forward`: `call`, the call as text, such as `module(x)`; `inputs` and `outputs`, each with `name`, `shape`, `fill`.
  The fill of an output is that of its cotangent; an output without one was not differentiated.
- `mode`: "eval" or "train".
- `state`: parameters and buffers in the published order, each with `name`, `shape`, `fill` and perhaps `dtype`.
- `sampled`: array name -> n, where only every n-th element of the flattened array is stored.
- `notes`: what to know about the case.

The npz has `out` (or `out0`, `out1`, ...), `grad_<input>`, `grad:<parameter>` and, in training mode, `buffer:<name>`;
`<output>_nan_rows` marks the rows of an output that are NaN.

State, inputs and cotangents are not stored. They are standard normal numbers from a generator seeded with the names of
case and array, shaped by the `fill`: "normal" (times `scale`), "positive" (magnitude plus 1/2), "constant" (`value`),
"mask" (above `threshold`, and everything in each of `full_rows`), "permute" (of another state array, by `axes`).
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from visattn.errors import UserError

__all__ = ["SHIPPED", "Case", "load_case", "load_cases"]

SHIPPED = Path(__file__).resolve().parent.parent / "golden"

Array = npt.NDArray[Any]

_LARGEST = 2**27  # values in one array: far above any block, far below what stops a machine
_DTYPES = ("float64", "int64")
_FILLS = {"normal": "scale", "positive": None, "constant": "value", "mask": "threshold", "permute": "of"}


@dataclass(frozen=True)
class Case:
    """One recorded run of a published class.

    Attributes:
        path: The json file.
        meta: Its content, checked.
        expected: What the published code gave, by array name.
    """

    path: Path
    meta: Mapping[str, Any]
    expected: Mapping[str, Array]

    @property
    def name(self) -> str:
        """Name of the case."""
        return str(self.meta["case"])

    @property
    def mechanism(self) -> str:
        """Name of the mechanism."""
        return str(self.meta["mechanism"])

    @property
    def source(self) -> Mapping[str, str]:
        """Repository, commit, file and class of the published code."""
        source: Mapping[str, str] = self.meta["source"]
        return source

    @property
    def constructor(self) -> Mapping[str, Any]:
        """Keyword arguments of the published class."""
        constructor: Mapping[str, Any] = self.meta["constructor"]
        return constructor

    @property
    def training(self) -> bool:
        """Whether the module was in training mode."""
        return bool(self.meta["mode"] == "train")

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in order."""
        return [str(entry["name"]) for entry in self.meta["forward"]["outputs"]]

    @cached_property
    def state(self) -> dict[str, Array]:
        """Parameters and buffers under their published names."""
        arrays: dict[str, Array] = {}
        for entry in self.meta["state"]:
            fill = entry["fill"]
            if fill["kind"] == "permute":
                array = np.transpose(arrays[fill["of"]], fill["axes"]).copy()
            else:
                array = self._filled(entry["name"], entry["shape"], fill)
            arrays[entry["name"]] = array.astype(entry.get("dtype", "float64"))
        return arrays

    @cached_property
    def inputs(self) -> dict[str, Array]:
        """Arguments of the call."""
        entries = self.meta["forward"]["inputs"]
        return {e["name"]: self._filled(f"input:{e['name']}", e["shape"], e["fill"]) for e in entries}

    @cached_property
    def cotangents(self) -> dict[str, Array]:
        """What each differentiated output is multiplied with before the sum."""
        entries = [entry for entry in self.meta["forward"]["outputs"] if "fill" in entry]
        return {e["name"]: self._filled(f"cotangent:{e['name']}", e["shape"], e["fill"]) for e in entries}

    def step(self, name: str) -> int:
        """How many elements of the flattened array lie between two stored ones."""
        return int(self.meta.get("sampled", {}).get(name, 1))

    def normal(self, key: str, shape: list[int]) -> Array:
        """The standard normal numbers of the array called `key`."""
        seed = zlib.crc32(f"{self.name}/{key}".encode()) & 0x7FFFFFFF
        return np.asarray(np.random.RandomState(seed).standard_normal(tuple(shape)))

    def _filled(self, key: str, shape: list[int], fill: Mapping[str, Any]) -> Array:
        if fill["kind"] == "constant":
            return np.full(tuple(shape), float(fill["value"]))
        normal = self.normal(key, shape)
        if fill["kind"] == "normal":
            return np.asarray(normal * fill["scale"])
        if fill["kind"] == "positive":
            return np.asarray(np.abs(normal) + 0.5)
        mask = np.asarray(normal > fill["threshold"])
        for row in fill.get("full_rows", ()):
            mask[tuple(row)] = True
        return mask


def load_cases(folder: Path) -> list[Case]:
    """All cases in a folder and the folders below, sorted by path.

    Raises:
        UserError: No such folder, no case in it, or something that is not a well-formed case.
    """
    try:
        exists = folder.exists()
    except OSError as error:
        raise UserError(f"cannot look into {folder} ({error.strerror})") from error
    if not exists:
        raise UserError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise UserError(f"not a folder: {folder}. Give the folder that holds the cases")
    paths = sorted(path for path in folder.rglob("*.json") if path.is_file())
    orphans = [path for path in sorted(folder.rglob("*.npz")) if not path.with_suffix(".json").is_file()]
    if orphans:
        raise UserError(f"{orphans[0]}: recorded arrays without their {orphans[0].stem}.json")
    if not paths:
        raise UserError(f"no recorded case in {folder}: a case is a .json beside a .npz")
    return [load_case(path) for path in paths]


def load_case(path: Path) -> Case:
    """Read and check one case.

    Args:
        path: Its json file; the npz lies beside it.

    Raises:
        UserError: Anything that is not as the format says, with the file and what is wrong. Nothing is unpickled.
    """
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    for problem in _problems(meta):
        raise UserError(f"{path}: not a recorded case: {problem}")
    return Case(path, meta, _arrays(path.with_suffix(".npz")))


def _arrays(path: Path) -> dict[str, Array]:
    """Read the arrays of an npz."""
    if not path.is_file():
        raise UserError(f"{path}: missing; a case is a .json beside a .npz")
    try:
        with zipfile.ZipFile(path) as archive:
            large = [info.filename for info in archive.infolist() if info.file_size > 8 * _LARGEST + 1024]
        if large:
            raise UserError(f"{path}: {large[0]!r} is too large for a recorded array")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UserError:
        raise
    except Exception as error:  # a damaged archive may raise anything, and whatever it raises is the file's fault
        hint = "holds Python objects, which are never unpickled" if "pickle" in str(error) else f"broken ({error})"
        raise UserError(f"{path}: {hint}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fbiu":
            raise UserError(f"{path}: {name!r} is not an array of numbers")
        if not name.isprintable():
            raise UserError(f"{path}: array name {name!r} is not printable")
    return arrays


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _problems(meta: Any) -> Iterator[str]:
    """What is wrong with the content of a json file; the caller reports the first."""
    if not isinstance(meta, dict):
        yield "an object is needed"
        return
    missing = [
        key for key in ("mechanism", "case", "source", "constructor", "forward", "mode", "state") if key not in meta
    ]
    if missing:
        yield f"no {', '.join(map(repr, missing))}"
        return
    if not (_is_name(meta["mechanism"]) and _is_name(meta["case"])):
        yield "'mechanism' and 'case' must be names"
    source = meta["source"]
    if not isinstance(source, dict) or not all(_is_name(source.get(k)) for k in ("repo", "commit", "file", "class")):
        yield "'source' needs 'repo', 'commit', 'file' and 'class'"
    if not isinstance(meta["constructor"], dict):
        yield "'constructor' must be an object of keyword arguments"
    if meta["mode"] not in ("eval", "train"):
        yield f"'mode' must be 'eval' or 'train', got {meta['mode']!r}"
    forward = meta["forward"]
    if not isinstance(forward, dict) or not isinstance(forward.get("call"), str):
        yield "'forward' needs 'call', the call as text"
        return
    for part in ("inputs", "outputs"):
        if not isinstance(forward.get(part), list) or not forward[part]:
            yield f"'forward' needs a list of {part!r}"
            return
        yield from _array_problems(forward[part], part, fill_required=part == "inputs")
    if not isinstance(meta["state"], list):
        yield "'state' must be a list"
        return
    yield from _array_problems(meta["state"], "state", fill_required=True)
    sampled = meta.get("sampled", {})
    if not isinstance(sampled, dict) or not all(_is_count(n, 1) for n in sampled.values()):
        yield "'sampled' must give a whole number above 0 for each array"


def _array_problems(entries: list[Any], part: str, fill_required: bool) -> Iterator[str]:
    """What is wrong with a list of arrays."""
    shapes: dict[str, list[int]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_name(entry.get("name")):
            yield f"an entry of {part!r} has no name"
            return
        name, shape = entry["name"], entry.get("shape")
        if name in shapes:
            yield f"{part} {name!r} is there twice"
        if not isinstance(shape, list) or not all(_is_count(size) for size in shape) or len(shape) > 8:
            yield f"{part} {name!r}: 'shape' must be a list of whole numbers, got {shape!r}"
            return
        if math.prod(shape) > _LARGEST:
            yield f"{part} {name!r}: {shape} is too large"
            return
        if entry.get("dtype", "float64") not in _DTYPES:
            yield f"{part} {name!r}: dtype must be one of {', '.join(_DTYPES)}, got {entry['dtype']!r}"
        if fill_required or "fill" in entry:
            yield from _fill_problems(f"{part} {name!r}", entry.get("fill"), shape, shapes)
        shapes[name] = shape


def _fill_problems(label: str, fill: Any, shape: list[int], earlier: Mapping[str, list[int]]) -> Iterator[str]:
    """What is wrong with the fill of an array; `earlier` has the shapes of the arrays before it."""
    kind = fill.get("kind") if isinstance(fill, dict) else None
    if not isinstance(kind, str) or kind not in _FILLS:
        yield f"{label}: 'fill' needs a kind out of {', '.join(_FILLS)}, got {fill!r}"
        return
    if kind == "permute":
        axes = fill.get("axes")
        if not label.startswith("state") or not isinstance(fill.get("of"), str) or fill["of"] not in earlier:
            yield f"{label}: permutes {fill.get('of')!r}, which is not an earlier state array"
        elif not isinstance(axes, list) or not all(map(_is_count, axes)) or sorted(axes) != [*range(len(shape))]:
            yield f"{label}: 'axes' must name each axis once, got {axes!r}"
        elif len(earlier[fill["of"]]) != len(shape) or [earlier[fill["of"]][axis] for axis in axes] != shape:
            yield f"{label}: {fill['of']!r} permuted by {axes} does not have shape {shape}"
        return
    number = _FILLS[kind]
    if number is not None and not _is_number(fill.get(number)):
        yield f"{label}: fill {kind!r} needs a number {number!r}, got {fill.get(number)!r}"
    rows = fill.get("full_rows", [])
    inside = isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) <= len(shape)
        and all(_is_count(index) and index < size for index, size in zip(row, shape, strict=False))
        for row in rows
    )
    if not inside:
        yield f"{label}: 'full_rows' must be indices into {shape}, got {rows!r}"
