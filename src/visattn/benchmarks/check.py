"""The gate before the clock: what is timed gives what the reference gives, as far as the precision allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from visattn.benchmarks.contenders import Contender, Task
from visattn.testing.tolerance import FLOAT64_TOLERANCE, NEIGHBOURS, budget_used, deviation, nudge, relative_error

__all__ = ["Gate", "Verdict"]

HOPELESS = 10.0  # so many times the budget is not bad luck, and no neighbouring input is tried

Arrays = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What came of a check.

    Attributes:
        equal: Whether everything is as close as the precision allows.
        used: Largest share of the permitted deviation.
        reason: The worst array and by how much it is off; empty if equal.
    """

    equal: bool
    used: float
    reason: str = ""


class Gate:
    """Checks contenders of one task.

    The exact results are those of the reference in float64 from the same numbers. In float64 a contender keeps to one
    part in 10^10; below, it may lose twice what the reference loses there, plus one rounding step, and where a single
    run exceeds that, on average over neighbouring inputs (see `visattn.testing.tolerance`). Where the exact result is
    zero by an identity, as is the gradient of a bias that a softmax or a norm cancels, terms cancel whose rounding step
    is that of the largest result.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._exact, self._low = self._references(task)

    @staticmethod
    def _references(task: Task) -> tuple[Arrays, Arrays]:
        """The reference in float64, and in the precision of the task."""
        exact = Contender("exact", task.map(lambda x: x.to(torch.float64), torch.float64), "reference").results()
        low = exact if task.dtype == torch.float64 else Contender("reference", task, "reference").results()
        return exact, low

    def check(self, contender: Contender) -> Verdict:
        """Run a contender and compare; it has the task's numbers again afterwards."""
        actual = contender.results()
        try:
            return self._compare(contender, actual)
        finally:
            contender.load(self.task)

    def _compare(self, contender: Contender, actual: Arrays) -> Verdict:
        if self.task.dtype == torch.float64:
            used = {name: relative_error(actual[name], want) / FLOAT64_TOLERANCE for name, want in self._exact.items()}
        else:
            used = {name: self._used(name, [(actual, self._low, self._exact)]) for name in self._exact}
            doubtful = [name for name, value in used.items() if 1 < value <= HOPELESS]
            if doubtful:
                runs = [(actual, self._low, self._exact), *self._neighbours(contender)]
                used |= {name: self._used(name, runs) for name in doubtful}
        worst = max(used, key=lambda name: used[name])
        if used[worst] <= 1:
            return Verdict(True, used[worst])
        dtype = str(self.task.dtype).removeprefix("torch.")
        return Verdict(False, used[worst], f"{worst} is off by {used[worst]:.3g} times what {dtype} allows")

    def _used(self, name: str, runs: Sequence[tuple[Arrays, Arrays, Arrays]]) -> float:
        """The share of the budget that an array uses over some runs."""
        largest = max(float(exact.abs().max()) for exact in self._exact.values())
        if float(self._exact[name].abs().max()) < 1e-12 * largest:
            step = torch.finfo(self.task.dtype).eps * largest
            return max(deviation(a[name], c[name]) / (2 * deviation(b[name], c[name]) + step) for a, b, c in runs)
        return budget_used([(a[name], b[name], c[name]) for a, b, c in runs], self.task.dtype)

    def _neighbours(self, contender: Contender) -> Iterator[tuple[Arrays, Arrays, Arrays]]:
        """What contender, reference and exact computation give for inputs a rounding step away."""
        dtype = self.task.dtype
        for seed in range(NEIGHBOURS):
            task = self.task.map(partial(_nudged, dtype=dtype, seed=seed), dtype)
            exact, low = self._references(task)
            contender.load(task)
            yield contender.results(), low, exact


def _nudged(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    return nudge(x.to(torch.float64), dtype, seed).to(dtype)
