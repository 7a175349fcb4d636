"""The docs page of timings, drawn from the committed results: `python -m visattn.benchmarks.table`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from visattn.benchmarks.report import kernels, number, summary_lines
from visattn.benchmarks.results import read
from visattn.writing import write_text

__all__ = ["main", "render"]

_HEAD = """# Benchmarks

Drawn by `python -m visattn.benchmarks.table` from `benchmarks/results/*.json`, which `make bench` writes. Do not edit.

Every row was checked against the reference, which is the authors' arithmetic, before it was timed, unless its last
column says otherwise. `times reference` is the reference's median by the row's: above 1 is faster, and what is slower
stays in. `% of limit` is what the device takes at least, the larger of FLOPs by the measured rate of a matrix product
and bytes that must move by the measured rate of a copy, by the median. `training` is a forward pass and the backward
pass to the input and all parameters. Peak memory is what a call allocates at one time, inputs and parameters not
included. Peers (`fightingcv`, `timm`) compute other functions, so only their speed is told.
"""
_COLUMNS = (
    ("shape", "batch", "contender"),
    ("median ms", "p20", "p80", "peak MiB", "GFLOP", "parameters", "times reference", "% of limit"),
    ("check",),
)


def render(folder: Path) -> str:
    """The page for the results in a folder.

    Raises:
        UserError: A file is not fit to read.
    """
    files = sorted(folder.glob("*.json"))
    parts = [_HEAD, *(_section(file.name, read(file)) for file in files)]
    if not files:
        parts.append("No results are recorded yet.\n")
    return "\n".join(parts)


def _section(name: str, content: dict[str, Any]) -> str:
    machine, settings = content["machine"], content["settings"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    commit = f"commit {content['commit'][:12]}" if content["commit"] else f"visattn {content['versions']['visattn']}"
    lines = [
        f"## {machine['name']}{threads}, {settings['dtype']}",
        "",
        f"{content['date']}, {commit}, torch {content['versions']['torch']}, `{name}`. Matrix product "
        f"{machine['gemm_gflops']:,.0f} GFLOP/s, copy {machine['copy_gbps']:,.1f} GB/s, {kernels(machine)}.",
        "",
        *(f"- {line}" for line in summary_lines(content)),
        *(f"- skipped {entry['contender']}: {entry['reason']}" for entry in content["skipped"]),
        "",
    ]
    left, right, end = _COLUMNS
    for mode in settings["modes"]:
        lines += [f"### {mode}", "", f"| {' | '.join((*left, *right, *end))} |"]
        lines.append(f"| {' | '.join(['---'] * len(left) + ['---:'] * len(right) + ['---'])} |")
        lines += [_line(row) for row in content["rows"] if row["mode"] == mode]
        lines.append("")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    parameters = "-" if row["parameters"] is None else f"{row['parameters']:,}"
    percent = "-" if row["percent_of_limit"] is None else f"{row['percent_of_limit']:.0f}"
    reason = row["reason"].replace("|", "\\|")
    cells = [
        row["shape"],
        str(row["batch"]),
        row["contender"],
        *(number(row[key]) for key in ("median_ms", "p20_ms", "p80_ms", "peak_mib", "gflop")),
        parameters,
        number(row["ratio"]),
        percent,
        f"{row['verdict']}: {reason}" if reason else row["verdict"],
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Draw the page of timings from recorded results.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(arguments)
    write_text(options.page, render(options.results))


if __name__ == "__main__":
    main()
