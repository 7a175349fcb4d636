"""Parameters and multiply-adds of the networks beside those that their papers print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import visattn
from visattn.errors import require
from visattn.profile import count_flops, count_parameters
from visattn.writing import writable, write_json

__all__ = ["ENTRIES", "Entry", "Row", "audit", "measure"]

LAYERS = "convolutions and linear layers"
NORMS = "convolutions, linear layers, and 2 for each value of a batch norm"
IMAGE = (3, 224, 224)
EXPLAINED = 1.0  # percent of difference above which a row says why

_TEXT = (
    "the kernels (3, 5, 7, 9) that the paper's text gives; its printed count is that of (3, 5, 5, 7), the default here"
)


@dataclass(frozen=True)
class Entry:
    """A network and what is printed about it.

    Attributes:
        name: Of timm's registry.
        parameters: Published, in millions; None where nothing is.
        multiply_adds: Published, of one 224x224 image, in units of 10^9; None where nothing is.
        counted: What counts as a multiply-add in the published number.
        options: Of the network.
        why: What explains a difference of more than 1%.
    """

    name: str
    parameters: float | None
    multiply_adds: float | None
    counted: str = LAYERS
    options: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    @property
    def label(self) -> str:
        """The name, and the options where there are some."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


ENTRIES = (
    Entry("resnet50", 25.56, 4.1),
    Entry("resnext50_32x4d", 25.0, 4.24),
    Entry("sknet26", None, None),
    Entry("sknet50", 27.5, 4.47),
    Entry("sknet101", 48.9, 8.46),
    Entry("epsanet50", 22.56, 3.62, NORMS),
    Entry("epsanet101", 38.90, 6.82, NORMS),
    Entry("epsanet50_large", 27.90, 4.72, NORMS),
    Entry("epsanet101_large", 49.59, 8.97, NORMS),
    Entry("epsanet50_large", 27.90, 4.72, NORMS, {"kernel_size": (3, 5, 7, 9)}, _TEXT),
    Entry("epsanet101_large", 49.59, 8.97, NORMS, {"kernel_size": (3, 5, 7, 9)}, _TEXT),
)


@dataclass(frozen=True)
class Row:
    """One network, counted. Parameters in millions, multiply-adds in units of 10^9, differences in percent."""

    network: str
    parameters: float
    published_parameters: float | None
    parameters_difference: float | None
    multiply_adds: float
    published_multiply_adds: float | None
    multiply_adds_difference: float | None
    counted: str
    why: str

    @property
    def unexplained(self) -> bool:
        """Whether it differs by more than 1% and nothing says why."""
        found = (self.parameters_difference, self.multiply_adds_difference)
        return not self.why and any(abs(difference) > EXPLAINED for difference in found if difference is not None)


def measure(entry: Entry) -> Row:
    """Count a network; no memory is taken for its weights."""
    timm = require("timm", extra="compare", purpose="visattn audit")
    require("visattn.models", extra="compare", purpose="visattn audit")  # registers the networks with timm
    with torch.device("meta"):  # shapes are enough
        net: nn.Module = timm.create_model(entry.name, **entry.options).eval()
        image = torch.empty(1, *IMAGE)
        total = count_flops(net, image) // 2
        total += _in_norms(net, image) if entry.counted == NORMS else 0
    parameters, multiply_adds = count_parameters(net) / 1e6, total / 1e9
    return Row(
        entry.label,
        parameters,
        entry.parameters,
        _difference(parameters, entry.parameters),
        multiply_adds,
        entry.multiply_adds,
        _difference(multiply_adds, entry.multiply_adds),
        entry.counted,
        entry.why,
    )


def _in_norms(net: nn.Module, image: torch.Tensor) -> int:
    """Two for each value that goes through a batch norm."""
    values: list[int] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: values.append(2 * output.numel()))
        for module in net.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        net(image)
    for handle in handles:
        handle.remove()
    return sum(values)


def _difference(ours: float, published: float | None) -> float | None:
    return None if published is None else 100 * (ours / published - 1)


def audit(json_file: Path | None = None, entries: Sequence[Entry] = ENTRIES) -> bool:
    """Count every network and print it beside the published numbers.

    Args:
        json_file: Also write the rows there, whole or not at all.
        entries: What to count.

    Returns:
        Whether every difference is within 1% or explained.

    Raises:
        UserError: The file cannot be written, or timm is missing.
    """
    target = None if json_file is None else writable(json_file)
    rows = [measure(entry) for entry in entries]
    _show(rows)
    if target is not None:
        timm = require("timm", extra="compare", purpose="visattn audit")
        versions = {"visattn": visattn.__version__, "torch": str(torch.__version__), "timm": timm.__version__}
        write_json(target, {"format": 1, "versions": versions, "image": IMAGE, "rows": [asdict(row) for row in rows]})
    return not any(row.unexplained for row in rows)


def _show(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    table = Table(title=f"One image of {IMAGE[1]}x{IMAGE[2]}", title_justify="left")
    table.add_column("network")
    for heading in ("parameters\nM", "published", "difference", "multiply-adds\nG", "published", "difference"):
        table.add_column(heading, justify="right")
    notes = {NORMS: "a"}
    for row in rows:
        if row.why:
            notes.setdefault(row.why, chr(ord("a") + len(notes)))
        marks = "".join(f" [{notes[text]}]" for text in (row.counted, row.why) if text in notes)
        table.add_row(
            (row.network + marks).replace("[", r"\["),
            f"{row.parameters:.2f}",
            _printed(row.published_parameters),
            _percent(row.parameters_difference),
            f"{row.multiply_adds:.3f}",
            _printed(row.published_multiply_adds),
            _percent(row.multiply_adds_difference),
        )
    console.print(table)
    console.print(f"A multiply-add is one of {LAYERS}.", markup=False)
    said = {NORMS: f"counted are {NORMS}: that gives the published numbers to the last digit"}
    for text, mark in notes.items():
        console.print(f"[{mark}] {said.get(text, text)}.", markup=False)
    for row in rows:
        if row.unexplained:
            console.print(f"{row.network} differs by more than {EXPLAINED:g}%, and nothing explains it.", style="red")


def _printed(number: float | None) -> str:
    return "none" if number is None else f"{number:g}"


def _percent(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:+.2f}%"
