"""What `visattn bench` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from visattn.benchmarks.results import OURS, geometric_mean

__all__ = ["show"]

WIDTH = 100  # where the output is not a terminal
STYLES = {"NOT EQUAL": "bold red", "failed": "red", "unverified": "yellow"}


def show(content: dict[str, Any], console: Console | None = None) -> None:
    """Print results: rates, a table for each mode, what went wrong, and how ours stands.

    Args:
        content: What `visattn.benchmarks.run.bench` returns.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    machine, settings = content["machine"], content["settings"]
    threads = f", {machine['threads']} threads, {kernels(machine)}" if machine["device"] == "cpu" else ""
    console.print(Text(f"{machine['name']}{threads}, torch {content['versions']['torch']}, {settings['dtype']}"))
    rates = f"matrix product {machine['gemm_gflops']:,.0f} GFLOP/s, copy {machine['copy_gbps']:,.1f} GB/s"
    console.print(Text(f"limit = max(FLOPs / rate, bytes / rate): {rates}, measured in this run"))
    for mode in settings["modes"]:
        console.print(_table(mode, [row for row in content["rows"] if row["mode"] == mode]))
    for row in content["rows"]:
        if row["reason"]:
            line = f"{row['verdict']} {row['shape']} {row['mode']} {row['contender']}: {row['reason']}"
            console.print(Text(line, style=STYLES.get(row["verdict"], "")))
    for entry in content["skipped"]:
        console.print(Text(f"skipped {entry['contender']}: {entry['reason']}"))
    console.print(Text(f"Peak memory is beyond inputs and parameters. {content['memory_note']}"))
    for line in summary_lines(content):
        console.print(Text(line))


def kernels(machine: dict[str, Any]) -> str:
    """Whether the compiled kernels were there."""
    return "compiled kernels" if machine["kernels"] else "no compiled kernels"


def summary_lines(content: dict[str, Any]) -> list[str]:
    """How ours stands, a line for each mode and opponent; then what has no part in it."""
    lines = [
        f"{entry['mode']}: {entry['contender']} is {entry['geometric_mean']:.2f} times as fast as {entry['against']} "
        f"(geometric mean of {entry['shapes']}), least {entry['worst_ratio']:.2f} at {entry['worst']}"
        for entry in content["summary"]
    ]
    for mode in content["settings"]["modes"]:
        rows = {(row["shape"], row["contender"]): row for row in content["rows"] if row["mode"] == mode}
        bounds = [
            rows[shape, "reference"]["median_ms"] / row["limit_ms"]
            for (shape, contender), row in rows.items()
            if contender == OURS and rows.get((shape, "reference"), {}).get("median_ms") and row["limit_ms"]
        ]
        if bounds:
            mean = f"{geometric_mean(bounds):.2f} times as fast as reference (geometric mean of {len(bounds)})"
            lines.append(f"{mode}: the limit of this machine would be {mean}")
    without = sum(row["median_ms"] is None and row["contender"] == OURS for row in content["rows"])
    return [*lines, *([f"{without} without a time, in no mean: not equal or failed"] if without else [])]


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _table(mode: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=mode, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    table.add_column("shape", overflow="fold")
    table.add_column("contender", overflow="fold")
    for heading in ("median\nms", "p20\nms", "p80\nms", "peak\nMiB", "GFLOP", "times\nref.", "% of\nlimit"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("check")
    last, line = None, 0
    for row in rows:
        line = line + 1 if row["shape"] == last else 0
        if line == 0 and last is not None:
            table.add_row()
        last = row["shape"]
        size = "x".join(str(extent) for extent in [row["batch"], *row["size"]])
        parameters = "" if row["parameters"] is None else f", {number(row['parameters'] / 1e6)}M par."
        verdict = row["verdict"]
        if verdict == "NOT EQUAL" and row["budget_used"] is not None:
            verdict = f"{verdict} {row['budget_used']:.3g}x"
        percent = row["percent_of_limit"]
        table.add_row(
            Text(row["shape"] if line == 0 else f" {size}{parameters}" if line == 1 else ""),
            Text(row["contender"]),
            *(number(row[key]) for key in ("median_ms", "p20_ms", "p80_ms", "peak_mib", "gflop", "ratio")),
            "-" if percent is None else f"{percent:.0f}",
            Text(verdict, style=STYLES.get(row["verdict"], "")),
        )
    return table
