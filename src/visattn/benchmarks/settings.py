"""What the user asks of a benchmark, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visattn.benchmarks.contenders import MODES
from visattn.benchmarks.registry import Shape, shapes
from visattn.devices import find_device
from visattn.errors import UserError

__all__ = ["AGAINST", "DTYPES", "Settings"]

AGAINST = ("reference", "compiled", "peers")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark.

    Attributes:
        names: Mechanisms, aliases or blocks; all if empty.
        shapes: "paper", "small" or map sizes.
        device: "cpu", "cuda" or "cuda:<index>".
        dtype: One of `DTYPES`.
        modes: Of "inference" and "training".
        against: Of "reference", "compiled" and "peers".
        gate: Check results before anything is timed.
        json_file: Where results go; in a folder under the name of device and day.
    """

    names: tuple[str, ...] = ()
    shapes: str = "paper"
    device: str = "cpu"
    dtype: str = "float32"
    modes: tuple[str, ...] = MODES
    against: tuple[str, ...] = ("reference",)
    gate: bool = True
    json_file: Path | None = None

    def place(self) -> tuple[torch.device, torch.dtype]:
        """The device and the precision.

        Raises:
            UserError: A value that is none of the choices.
        """
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}. Choose from {', '.join(DTYPES)}")
        _choose("mode", self.modes, MODES)
        _choose("contender for --against", self.against, AGAINST)
        return find_device(self.device, "bench"), getattr(torch, self.dtype)

    def resolve(self) -> tuple[list[Shape], torch.device, torch.dtype]:
        """The shapes, the device and the precision.

        Raises:
            UserError: A value that is none of the choices.
        """
        device, dtype = self.place()
        return shapes(self.shapes, self.names), device, dtype

    def record(self) -> dict[str, Any]:
        """What decides the results, as JSON."""
        return {
            "names": list(self.names),
            "shapes": self.shapes,
            "dtype": self.dtype,
            "modes": list(self.modes),
            "against": list(self.against),
            "gate": self.gate,
        }


def _choose(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    if not given:
        raise UserError(f"no {what} given. Choose from {', '.join(known)}")
    for word in given:
        if word not in known:
            raise UserError(f"unknown {what} {word!r}. Choose from {', '.join(known)}")
