"""Tensors out of files, and nothing but tensors: no file can run anything here.

A pickle is a program for building objects. torch's `weights_only` reader knows the few functions that tensors are built
with and refuses everything else before it is called.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visattn.errors import one_line, require

__all__ = ["Content", "read"]

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "ema")
_SHARED = 32  # times that a tensor may be in a file under different names, on average
_DEPTH = 3  # wrappers inside one another
_COMMANDS = ("os", "posix", "nt", "subprocess", "sys", "builtins", "__builtin__", "shutil", "socket", "importlib")


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        tensors: By name.
        within: The entry they were under, dots between nested ones; empty where they were at the top.
        metadata: Of a safetensors file.
    """

    tensors: dict[str, Tensor]
    within: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


class _Inert:
    """Stands for a number of numpy's, such as the best accuracy so far: does nothing and keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_INERT: list[Any] = [
    (_Inert, name) for name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")
]


def read(file: Path) -> Content:
    """The tensors of a safetensors file or of one that `torch.save` wrote, in its present or its old format.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, empty, cut off, no checkpoint, one without tensors, or one that wants to build
            something else.
        UserError: It is a safetensors file and safetensors is not installed.
    """
    got = f"got file={str(file)!r}"
    if file.is_dir():
        raise ValueError(f"a checkpoint is a file, {got}, a folder. Give the file in it.")
    try:
        with file.open("rb") as stream:
            start = stream.read(16)
            size = stream.seek(0, 2)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file, {got}. Check the path.") from None
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror}), {got}. Check its permissions.") from error
    if size == 0:
        raise ValueError(f"the file is empty, {got}. Download or copy it again.")
    if start[8:9] == b"{":  # behind the length of the header
        content = _read_safetensors(file, got)
    elif start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        content = _unwrap(_read_pickle(file, start, size, got), got)
    else:
        page = " It looks like a web page saved in a file's place." if start.lstrip()[:1] == b"<" else ""
        raise ValueError(f"neither a safetensors file nor one that torch.save wrote, {got}.{page}")
    for name, tensor in content.tensors.items():
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or tensor.numel() * tensor.element_size() > size:  # strides of 0 can make much of little
            raise ValueError(f"tensor {name!r} is not one that the file holds as a whole, {got}.")
    if sum(tensor.nbytes for tensor in content.tensors.values()) > _SHARED * size:
        raise ValueError(f"the tensors share memory, and without would take {_SHARED} times the file or more, {got}.")
    return content


def _read_safetensors(file: Path, got: str) -> Content:
    safetensors = require("safetensors", extra="compare", purpose="reading a safetensors file")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            metadata = dict(opened.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise _cut_off(error, got) from error
    if not tensors:
        raise ValueError(f"the file holds no tensors, {got}.")
    return Content(tensors, metadata=metadata)


def _read_pickle(file: Path, start: bytes, size: int, got: str) -> Any:
    if start[:2] == b"PK":
        _check_archive(file, size, got)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
            warnings.simplefilter("ignore")  # of old formats, which is what published files are
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise _refused_or_damaged(error, got) from error


def _check_archive(file: Path, size: int, got: str) -> None:
    """Refuse a zip that is not as `torch.save` writes it: whole, not compressed, no bigger inside than outside."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _cut_off(error, got) from error
    names = {entry.filename.rsplit("/", 1)[-1] for entry in entries}
    if "constants.pkl" in names:
        raise ValueError(f"a TorchScript archive is a program, not a checkpoint, {got}. Save its state_dict() instead.")
    if "data.pkl" not in names:
        raise ValueError(f"a zip archive that torch.save did not write, {got}. Give the checkpoint inside it.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError(f"the archive is packed, which torch.save never does: it may be made to fill memory, {got}.")


def _cut_off(error: BaseException, got: str) -> ValueError:
    said = one_line(error).rpartition("WeightsUnpickler error: ")[2]  # torch's advice before it is to trust the file
    said = said if len(said) <= 120 else f"{said[:117]}..."
    return ValueError(f"the file is cut off or damaged ({said}), {got}. Download or copy it again.")


def _refused_or_damaged(error: BaseException, got: str) -> ValueError:
    """What the failure of torch's reader means."""
    text = str(error)
    if re.search(r"Unsupported operand \d+", text):
        return ValueError(
            f"the pickle is damaged or of a form that is not read safely; nothing was run, {got}. "
            "Where you trust the file, save it again with the defaults of torch.save."
        )
    wanted = re.search(r"GLOBAL ([\w.]+)|unrecognized function (.+)", text)
    if wanted is None:
        return _cut_off(error, got)
    name = wanted[1] or wanted[2].strip()[:80]
    refused = f"the pickle calls for {name}, and only tensors and plain values are read; nothing was run, {got}."
    if name.split(".")[0] in _COMMANDS:
        return ValueError(f"{refused} That can run commands: do not open the file with anything else either.")
    return ValueError(
        f"{refused} Where you trust the file, save its tensors alone: "
        'torch.save(torch.load(file, weights_only=False)["state_dict"], "tensors.pt").'
    )


def _is_state(value: Any) -> bool:
    """Whether a value is a dict of names with tensors among its values."""
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for k, v in value.items() if isinstance(k, str))


def _unwrap(value: Any, got: str) -> Content:
    """The state dict in what a training script saved around it."""
    within: list[str] = []
    for _ in range(_DEPTH):
        entries = value if isinstance(value, Mapping) else {}
        inside = next((key for key in _WRAPPERS if isinstance(entries.get(key), Mapping) and entries[key]), None)
        if inside is None and _is_state(value):
            tensors = {key: v for key, v in value.items() if isinstance(key, str) and isinstance(v, Tensor)}
            return Content(tensors, within=".".join(within))
        if inside is None:
            states = [key for key, entry in entries.items() if isinstance(key, str) and _is_state(entry)]
            if len(states) > 1:
                raise ValueError(f"the file holds several state dicts ({', '.join(states)}), {got}. Save one alone.")
            if not states:
                break
            inside = states[0]
        within.append(inside)
        value = entries[inside]
    held = ", ".join(map(str, list(value)[:5])) if isinstance(value, Mapping) and value else type(value).__name__
    raise ValueError(f"the file holds no state dict of tensors, only {held}, {got}.")
