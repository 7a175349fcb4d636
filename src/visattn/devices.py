"""The device that a user names, and its arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from visattn.errors import UserError

__all__ = ["PRECISIONS", "find_device", "precise_matmul"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # to train in


def find_device(name: str, command: str) -> torch.device:
    """The device of that name, if it is there.

    Args:
        name: Such as "cpu", "cuda" or "cuda:1".
        command: Who asks, for the message.

    Raises:
        UserError: No such device here, or one that is neither a CPU nor a CUDA device.
    """
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}. Devices here: {', '.join(here)}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index not in (None, 0)):
        raise UserError(f"{command} runs on cpu and cuda, got device {name!r}. Devices here: {', '.join(here)}")
    if device.type == "cuda" and f"cuda:{device.index or 0}" not in here:
        raise UserError(f"no device {name!r} here. Devices here: {', '.join(here)}")
    return device


@contextmanager
def precise_matmul() -> Iterator[None]:
    """Switch off TF32, whose float32 is not, and put the settings back."""
    backends = torch.backends
    before = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32)
    try:
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = False
        yield
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before
