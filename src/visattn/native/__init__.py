"""Kernels in C for what torch computes slowly on a CPU.

They are compiled when visattn is installed, where there is a C compiler; without them torch's own operations serve.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visattn.errors import check

__all__ = ["DTYPES", "MISSING", "available", "call", "flops", "leads", "memory_peak", "need", "served", "sources"]

Argument = Tensor | tuple[Tensor | None, ...] | ctypes.Structure | ctypes.Array[Any] | int | float | bool | None
DTYPES = (torch.float32, torch.float64)
MISSING = "visattn was installed without its kernels, or its C code has changed since"
FOLDER = Path(__file__).parent
FILE = FOLDER / "kernels.so"


@functools.cache
def _library() -> ctypes.CDLL | None:
    if platform.machine() == "x86_64" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    try:
        library = ctypes.CDLL(str(FILE))
        compiled = ctypes.c_uint32.in_dll(library, "visattn_sources").value
    except (OSError, ValueError):  # not compiled, for another system, or a torch without the threads that kernels use
        return None
    if compiled != sources():  # an editable install whose checkout has moved on
        return None
    for kind in ("float32", "float64"):
        getattr(library, f"memory_peak_{kind}").restype = ctypes.c_ssize_t
    return library


def sources() -> int:
    """What the C code beside this file is told by: `hatch_build.py` writes the same number into the library."""
    checksum = 0
    for file in sorted((*FOLDER.glob("*.c"), *FOLDER.glob("*.h"))):
        checksum = zlib.crc32(file.read_bytes(), checksum)
    return checksum


def available() -> bool:
    """Whether the kernels are compiled and this machine can run them."""
    return _library() is not None


def leads() -> bool:
    """Whether products of large matrices are worth taking from the kernels, which compute 8 float32 at a time.

    Torch's use as many as a processor has. With AVX-512 that is 16, and on ARM nothing was measured.
    """
    return available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def served(implementations: Iterable[str]) -> tuple[str, ...]:
    """Those implementations of an op that this installation has: "native" only with the kernels."""
    return tuple(name for name in implementations if name != "native" or available())


def need(*tensors: Tensor | None) -> None:
    """Raise unless there are kernels for these tensors.

    Raises:
        ValueError: They were not compiled, or the tensors are not of a CPU, or of a type without kernels.
    """
    check(
        available(),
        "impl='native'",
        MISSING,
        remedy="Leave impl at 'auto', or install again where there is a C compiler, with pip's --force-reinstall "
        "--no-deps --no-cache-dir.",
        machine=platform.machine(),
    )
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors if tensor is not None}
    rule = "the kernels are for float32 and float64 on a CPU"
    check(kinds <= {("cpu", dtype) for dtype in DTYPES}, "impl='native'", rule, tensors=sorted(map(str, kinds)))


_flops = 0


def flops() -> int:
    """FLOPs of all kernels since the start: torch's counters do not see them."""
    return _flops


def memory_peak() -> int:
    """The most bytes that kernels held for themselves at one time since the last call of this function."""
    library = _library()
    return (
        0 if library is None else sum(int(getattr(library, f"memory_peak_{kind}")()) for kind in ("float32", "float64"))
    )


def call(name: str, *arguments: Argument, flops: int) -> None:
    """Call a kernel with pointers to tensors, structures and arrays, numbers, and how many threads in the end.

    Several tensors are one argument, an array of pointers; NULL for None.

    Args:
        name: Of the kernel, without the type of the numbers, which is that of the first tensor.
        *arguments: As the kernel has them. Tensors are on the CPU, all of one type; strides are the caller's care.
        flops: What it computes, one multiply-add as 2.

    Raises:
        MemoryError: The kernel had no memory for its buffers.
    """
    global _flops
    library = _library()
    tensors = [
        tensor
        for argument in arguments
        for tensor in (argument if isinstance(argument, tuple) else (argument,))
        if isinstance(tensor, Tensor)
    ]
    kind = tensors[0].dtype
    for tensor in tensors:  # a kernel would read whatever lies there
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_neg()
        if library is None or not plain or tensor.dtype not in (kind, torch.uint8):
            raise ValueError(f"visattn.native: {name} was given a tensor of {tensor.device}, {tensor.dtype}")
        if tensor.data_ptr() == 0:
            raise RuntimeError(f"visattn.native: {name} was given a tensor whose memory was freed")
    _flops += flops
    given: list[Any] = []
    for argument in (*arguments, torch.get_num_threads()):
        if isinstance(argument, Tensor):
            given.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, tuple):
            pointers = [None if tensor is None else tensor.data_ptr() for tensor in argument]
            given.append(ctypes.byref((ctypes.c_void_p * len(pointers))(*pointers)))
        elif isinstance(argument, ctypes.Structure | ctypes.Array):
            given.append(ctypes.byref(argument))
        elif isinstance(argument, float):
            given.append(ctypes.c_double(argument))
        else:
            given.append(None if argument is None else ctypes.c_ssize_t(argument))
    if getattr(library, f"{name}_{str(kind).removeprefix('torch.')}")(*given) != 0:
        raise MemoryError(f"visattn.native: no memory for the buffers of {name}")
