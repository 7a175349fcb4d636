"""`visattn verify`: choose the cases, check them, print the table and write the JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import visattn
from visattn import blocks, native, registry
from visattn.devices import find_device, precise_matmul
from visattn.errors import UserError, did_you_mean
from visattn.profile import device_name
from visattn.testing.tolerance import FLOAT64_TOLERANCE, NEIGHBOURS
from visattn.verify.cases import SHIPPED, Case, load_cases
from visattn.verify.check import GROUPS, Result, check_case, group_of, implementations, skip_reason
from visattn.verify.networks import check_network, is_network
from visattn.writing import writable, write_text

__all__ = ["verify"]

_DTYPES = {dtype: getattr(torch, dtype) for dtype in ("float64", "float32", "bfloat16", "float16")}


def verify(
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    dtype: str = "float64",
    impl: str = "auto",
    networks: bool = False,
    json_file: Path | None = None,
    cases: Path | None = None,
    debug: bool = False,
    console: Console | None = None,
) -> bool:
    """Check recorded cases and print what came of them.

    Args:
        names: Mechanisms, aliases or cases; all if empty.
        device: Where to run, such as "cpu" or "cuda".
        dtype: "float64", "float32", "bfloat16" or "float16".
        impl: Implementation to check, or "all"; a case whose block has no such one is skipped.
        networks: Check the whole networks, their weights loaded from files, instead of the blocks; in float64 alone.
        json_file: Also write the results there, whole or not at all.
        cases: Folder of recorded cases; the shipped ones by default.
        debug: Let an exception in a block through.
        console: Where to print; standard output by default.

    Returns:
        Whether something was checked and all of it passed.

    Raises:
        UserError: Anything wrong with the arguments or the folder.
    """
    if dtype not in _DTYPES:
        raise UserError(f"unknown dtype {dtype!r}. Choose from {', '.join(_DTYPES)}")
    if impl == "native" and not native.available():
        raise UserError(f"{native.MISSING}. Leave --impl out, or install it again where there is a C compiler")
    known = sorted({name for block in vars(blocks).values() for name in getattr(block, "impls", ())})
    if impl not in ("all", *known):
        raise UserError(f"unknown implementation {impl!r}. Choose from all, {', '.join(known)}")
    if networks and (dtype, impl) != ("float64", "auto"):
        raise UserError("--networks checks what users get, in float64: leave --dtype and --impl out")
    place = find_device(device, "verify")
    if json_file is not None:
        json_file = writable(json_file)
    chosen = _choose(load_cases(SHIPPED if cases is None else cases), names)
    if networks:
        chosen = [case for case in chosen if is_network(case)]
        if not chosen:
            raise UserError(f"no network among the cases of {', '.join(names) or cases}")
    console = console or _console()
    results = []
    with precise_matmul():
        for case in chosen:
            if networks:
                results.append(check_network(case, device=place, debug=debug))
                continue
            reason = skip_reason(case, registry.MECHANISMS)
            if reason is not None:
                results.append(Result(case, "skipped", [reason]))
                continue
            if impl != "all" and impl not in implementations(case, place):
                results.append(Result(case, "skipped", [f"its block has no implementation {impl!r} for it"]))
                continue
            results.append(check_case(case, device=place, dtype=_DTYPES[dtype], impl=impl, debug=debug))
    _print(console, results, device, dtype)
    if impl == "all" and not native.available():
        console.print(f'impl="native" is not checked: {native.MISSING}.')
    if json_file is not None:
        write_text(json_file, json.dumps(_as_json(results, place, dtype, impl), indent=2, allow_nan=False) + "\n")
    return any(r.verdict == "passed" for r in results) and not any(r.verdict == "failed" for r in results)


def _choose(cases: list[Case], names: Sequence[str]) -> list[Case]:
    """The cases of these mechanisms, aliases or case names."""
    known = {case.mechanism for case in cases} | {case.name for case in cases}
    wanted = set()
    for name in names:
        if name in known:
            wanted.add(name)
            continue
        try:
            block = registry.resolve(name).name  # of a mechanism or one of its forms, such as external_tokens
        except ValueError as error:
            mechanisms = sorted({case.mechanism for case in cases})
            hint = did_you_mean(name, sorted(known), f"Choose from {', '.join(mechanisms)} or a case")
            raise UserError(f"unknown mechanism or case {name!r}. {hint}") from error
        mechanism = next((key for key in registry.MECHANISMS if block.startswith(key)), block)
        if mechanism not in known:
            raise UserError(f"no case of {mechanism!r} among the recorded cases")
        wanted.add(mechanism)
    return [case for case in cases if not wanted or {case.mechanism, case.name} & wanted]


def _console() -> Console:
    """Standard output; where it is not a terminal, wide enough for a line per case."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _print(console: Console, results: list[Result], device: str, dtype: str) -> None:
    """Table of the checked cases, then what is skipped, then one line."""
    checked = [result for result in results if result.verdict != "skipped"]
    skipped = [result for result in results if result.verdict == "skipped"]
    if checked:
        console.print(_table(checked, device, dtype))
        for result in checked:
            for note in result.notes:
                console.print(Text(f"{result.case.mechanism}/{result.case.name}: {note}."))
            for reason in result.reasons:
                console.print(Text(f"failed {result.case.mechanism}/{result.case.name}: {reason}", style="red"))
    if skipped:
        console.print(Text(f"Skipped {len(skipped)}:"))
        for result in skipped:
            console.print(Text(f"  {result.case.mechanism}/{result.case.name}: {result.reasons[0]}"))
    passed = sum(result.verdict == "passed" for result in checked)
    bound = f"within {FLOAT64_TOLERANCE:.0e}" if dtype == "float64" else f"float64 within 1e-10, {dtype} within budget"
    summary = f"{passed} passed ({bound}), {len(checked) - passed} failed, {len(skipped)} skipped on {device}"
    console.print(Text(summary if checked else f"Nothing was verified: {summary}"))


def _table(results: list[Result], device: str, dtype: str) -> Table:
    table = Table(title=f"Largest relative error against published code, {dtype} on {device}", title_justify="left")
    for heading in ("mechanism", "case", "published code"):
        table.add_column(heading, overflow="fold")
    for heading in ("outputs", "input\ngradients", "parameter\ngradients", "buffers"):
        table.add_column(heading, justify="right")
    if dtype != "float64":
        table.add_column("of the\nbudget", justify="right")
    table.add_column("verdict")
    for result in results:
        source = result.case.source
        numbers = [_number(result.largest(group)) for group in GROUPS]
        if dtype != "float64":
            numbers.append(f"{max(result.budget_used.values()):.0%}" if result.budget_used else "-")
        table.add_row(
            *(Text(cell) for cell in (result.case.mechanism, result.case.name)),
            Text(f"{source['repo']} {source['class']} @ {source['commit'][:7]}"),
            *numbers,
            Text(result.verdict, style="green" if result.verdict == "passed" else "red"),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _as_json(results: list[Result], device: torch.device, dtype: str, impl: str) -> dict[str, Any]:
    """Everything that was measured; a number that is not finite becomes null."""

    def finite(errors: dict[str, float]) -> dict[str, float | None]:
        return {name: error if math.isfinite(error) else None for name, error in errors.items()}

    hardware = device_name(device)
    verdicts = [result.verdict for result in results]
    return {
        "format": 1,
        "versions": {
            "visattn": visattn.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": str(device),
        "hardware": hardware,
        "dtype": dtype,
        "impl": impl,
        "tolerance": {
            "float64": FLOAT64_TOLERANCE,
            "lower": "twice what the reference implementation loses in that dtype, plus one rounding step; "
            f"where one run exceeds that, on average with {NEIGHBOURS} inputs a rounding step away",
        },
        "passed": verdicts.count("passed"),
        "failed": verdicts.count("failed"),
        "skipped": verdicts.count("skipped"),
        "cases": [
            {
                "mechanism": result.case.mechanism,
                "case": result.case.name,
                "source": dict(result.case.source),
                "verdict": result.verdict,
                "reasons": result.reasons,
                "notes": result.notes,
                "largest": finite({g: e for g in GROUPS if (e := result.largest(g)) is not None}),
                "errors": finite(result.errors),
                "float64_errors": finite(result.float64_errors),
                "budget_used": finite(result.budget_used),
                "groups": {name: group_of(name) for name in result.errors},
            }
            for result in results
        ],
    }
