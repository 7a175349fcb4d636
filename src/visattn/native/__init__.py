"""Kernels in C for what torch computes slowly on a CPU: narrow groups of a convolution.

They are compiled when visattn is installed, where there is a C compiler; without them torch's own operations serve.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

__all__ = ["library"]

FILE = Path(__file__).with_name("kernels.so")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, or this machine cannot run them."""
    if not FILE.exists():
        return None
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512", "DEFAULT"):
        return None
    try:
        return ctypes.CDLL(str(FILE))
    except OSError:  # of another system, or a torch without the threads that they use
        return None
