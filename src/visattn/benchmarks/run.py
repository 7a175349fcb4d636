"""`visattn bench`: check, count and time every contender at every shape, then say how they stand."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

import torch

import visattn
from visattn.benchmarks import flops, machine, memory, peers, results
from visattn.benchmarks.check import Gate
from visattn.benchmarks.contenders import Contender, Task, compiled, fused
from visattn.benchmarks.machine import Machine
from visattn.benchmarks.registry import Shape
from visattn.benchmarks.results import Row
from visattn.benchmarks.settings import Settings
from visattn.benchmarks.timing import SECONDS, Timed, interleave, summarise
from visattn.devices import precise_matmul
from visattn.errors import one_line
from visattn.profile import MIB, device_name

__all__ = ["bench", "passed"]

T = TypeVar("T")
Pairs = list[tuple[Row, Contender | None]]

LONGEST = 300  # characters of a reason


def bench(
    settings: Settings,
    *,
    debug: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    seconds: float = SECONDS,
    rates: Callable[[torch.device, torch.dtype], Machine] = machine.measure,
) -> dict[str, Any]:
    """Measure what the settings ask for, and write it where they say.

    Args:
        settings: What to measure.
        debug: Let an exception in a contender through.
        say: Is told of the progress.
        seconds: Time for each contender at each shape.
        rates: Measures the machine.

    Returns:
        What is written (see `visattn.benchmarks.results.SCHEMA`).

    Raises:
        UserError: Wrong settings, or a file that cannot be written.
    """
    shapes, device, dtype = settings.resolve()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    file = settings.json_file
    if file is not None:
        file = results.target(file, results.file_name(device_name(device), date, settings.dtype))
    measured: list[_Measurement] = []
    skipped: list[dict[str, str]] = []
    with precise_matmul():
        say("measuring the machine")
        limits = rates(device, dtype)
        tasks = [(shape, mode) for shape in shapes for mode in settings.modes]
        for done, (shape, mode) in enumerate(tasks, 1):
            say(f"[{done}/{len(tasks)}] {shape.label} {mode}")
            measured.append(_Measurement(shape, mode, settings, device, dtype, seconds, debug))
        say("measuring the machine again")  # the better rates count: a busy minute must not lower the limit
        limits = limits.best(rates(device, dtype))
    for entry in measured:
        entry.compare(limits)
    rows = [row for entry in measured for row in entry.rows]
    if "peers" in settings.against:
        say("peers, in a process of their own")
        theirs, skipped = peers.measure_apart(settings, seconds=seconds)
        rows = _merge(rows, theirs)
    content = {
        "format": results.FORMAT,
        "date": date,
        "commit": machine.commit(),
        "versions": machine.versions(),
        "machine": limits.record(),
        "settings": settings.record(),
        "rows": [results.record(row) for row in rows],
        "summary": [results.record(entry) for entry in results.summarise(rows)],
        "skipped": skipped,
        "memory_note": memory.NOT_SEEN if device.type == "cpu" else "torch.cuda.max_memory_allocated",
    }
    results.validate(content)
    if file is not None:
        results.write(file, content)
        say(f"wrote {file}")
    return content


class _Measurement:
    """All contenders at one shape in one mode."""

    def __init__(
        self,
        shape: Shape,
        mode: str,
        settings: Settings,
        device: torch.device,
        dtype: torch.dtype,
        seconds: float,
        debug: bool,
    ) -> None:
        self.shape, self.mode, self.settings, self.device = shape, mode, settings, device
        self.seconds, self.debug, self.moved = seconds, debug, 0
        gc.collect()
        row = self._row("visattn")
        self.rows = [row]
        task = self._attempt([row], lambda: Task.of(shape, mode, dtype, device))
        if task is not None:
            self.moved = task.moved
            self._measure(task)

    def _measure(self, task: Task) -> None:
        """Check, count and time all contenders."""
        pairs = self._contenders(task)
        if self.settings.gate:
            self._gate(task, pairs)
        for row, contender in _runnable(pairs):
            self._attempt([row], partial(self._count, row, contender))
        left = _runnable(pairs)
        self._attempt([row for row, _ in left], lambda: self._time(left))
        self.rows = [row for row, _ in pairs]

    def _row(self, name: str) -> Row:
        shape = self.shape
        batch = shape.batch_on(self.device)
        return Row(shape.label, shape.mechanism, shape.block, list(shape.size), batch, self.mode, name)

    def _attempt(self, rows: Sequence[Row], call: Callable[[], T]) -> T | None:
        """What a call gives; an exception becomes the rows' reason, as other contenders can still be measured."""
        try:
            return call()
        except Exception as error:
            if self.debug:
                raise
            for row in rows:
                row.verdict, row.reason = "failed", f"{type(error).__name__}: {one_line(error)}"[:LONGEST]
            return None

    def _contenders(self, task: Task) -> list[tuple[Row, Contender | None]]:
        """Rows and contenders; None where one cannot be built."""
        makers: dict[str, Callable[[], Contender]] = {"visattn": lambda: Contender("visattn", task, "auto")}
        if self.mode == "inference" and hasattr(visattn, "fuse"):
            makers["fused"] = lambda: fused(task)
        if "reference" in self.settings.against:
            makers["reference"] = lambda: Contender("reference", task, "reference")
        if "compiled" in self.settings.against:
            makers["compiled"] = lambda: compiled(task)
        return [(row := self._row(name), self._attempt([row], make)) for name, make in makers.items()]

    def _gate(self, task: Task, pairs: Pairs) -> None:
        """Check every contender."""
        exact = self._row("reference")
        gate = self._attempt([exact], lambda: Gate(task))
        for row, contender in _runnable(pairs):
            if gate is None:
                row.reason = f"the reference in float64: {exact.reason}"[:LONGEST]
                continue
            if contender.name == "reference":
                row.verdict = "equal"  # by definition: the gate has run it
                continue
            verdict = self._attempt([row], partial(gate.check, contender))
            if verdict is not None:
                row.verdict = "equal" if verdict.equal else "NOT EQUAL"
                row.budget_used, row.reason = verdict.used, verdict.reason

    def _count(self, row: Row, contender: Contender) -> None:
        """Parameters, FLOPs and peak memory."""
        row.parameters = contender.parameters
        if contender.runs == 0:
            contender.run()  # the first run may keep what it allocates
        contender.prepare()
        row.peak_mib = memory.peak_bytes(contender.run, self.device) / MIB
        if row.contender != "compiled":  # it has the FLOPs of what it was compiled from
            contender.prepare()
            row.gflop = flops.count(contender.run) / 1e9
        contender.prepare()

    def _time(self, pairs: list[tuple[Row, Contender]]) -> None:
        """Time in turns."""
        timed = [Timed(contender.run, contender.prepare, warm=contender.runs > 1) for _, contender in pairs]
        for (row, _), own in zip(pairs, interleave(timed, self.device, seconds=self.seconds), strict=True):
            times = summarise(own)
            row.median_ms, row.p20_ms, row.p80_ms, row.runs = times.median, times.p20, times.p80, times.runs

    def compare(self, limits: Machine) -> None:
        """Fill in the ratio to the reference and the share of the limit."""
        rows = self.rows
        by_name = {row.contender: row for row in rows}
        counted = [row.gflop for row in rows if row.gflop is not None]
        if "compiled" in by_name and "reference" in by_name:
            by_name["compiled"].gflop = by_name["reference"].gflop
        if not counted:
            return
        limit = limits.limit_ms(1e9 * min(counted), self.moved)
        reference = by_name["reference"].median_ms if "reference" in by_name else None
        for row in rows:
            row.limit_ms = limit
            if row.median_ms:
                row.percent_of_limit = 100 * limit / row.median_ms
                row.ratio = None if reference is None else reference / row.median_ms


def _runnable(pairs: Pairs) -> list[tuple[Row, Contender]]:
    """Those that can be built and gave nothing wrong so far."""
    return [(row, c) for row, c in pairs if c is not None and row.verdict in ("equal", "unverified")]


def _merge(rows: list[Row], theirs: list[Row]) -> list[Row]:
    """Peers' rows behind ours of the same shape and mode, with the ratio to the reference."""
    merged = []
    for index, row in enumerate(rows):
        merged.append(row)
        key = (row.shape, row.mode)
        if index + 1 < len(rows) and (rows[index + 1].shape, rows[index + 1].mode) == key:
            continue
        times = {r.contender: r.median_ms for r in rows if (r.shape, r.mode) == key}
        for peer in theirs:
            if (peer.shape, peer.mode) == key:
                reference = times.get("reference")
                if reference is not None and peer.median_ms:
                    peer.ratio = reference / peer.median_ms
                merged.append(peer)
    return merged


def passed(content: dict[str, Any]) -> bool:
    """Whether no contender gave something else than the reference, and none failed."""
    return not any(row["verdict"] in ("NOT EQUAL", "failed") for row in content["rows"])
