"""Times of several contenders, taken in turns so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timed", "Times", "interleave", "summarise"]

SECONDS = 1.0  # for each contender; no further round starts after them all
LEAST = 5  # rounds at least, whatever the time
MOST = 50  # rounds at most
WARM_SECONDS = 0.05  # a contender is run again and again for so long before the clock counts, but once at least


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Timed:
    """What is timed.

    Attributes:
        run: Is timed.
        prepare: Runs before each time, outside the clock.
        warm: It has run before and need not be warmed.
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any] = _nothing
    warm: bool = False


@dataclass(frozen=True)
class Times:
    """Milliseconds: median, 20th and 80th percentile, and how many runs they are from."""

    median: float
    p20: float
    p80: float
    runs: int


def interleave(
    contenders: Sequence[Timed],
    device: torch.device,
    *,
    seconds: float = SECONDS,
    least: int = LEAST,
    most: int = MOST,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time contenders in rounds, each once a round, all warmed first.

    Args:
        contenders: What to time.
        device: Is waited for before and after each run.
        seconds: For each contender; together they are when no further round starts.
        least: Rounds at least.
        most: Rounds at most.
        clock: Tells the time in seconds.

    Returns:
        Milliseconds of every run, a list for each contender.
    """
    for contender in contenders:
        until, warm = clock() + WARM_SECONDS, contender.warm
        while not warm:
            contender.prepare()
            contender.run()
            _wait(device)
            warm = clock() >= until
    times: list[list[float]] = [[] for _ in contenders]
    until = clock() + seconds * len(contenders)
    for done in range(most):
        if done >= least and clock() >= until:
            break
        for contender, own in zip(contenders, times, strict=True):
            contender.prepare()
            _wait(device)
            start = clock()
            contender.run()
            _wait(device)
            own.append(1000 * (clock() - start))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(times: Sequence[float]) -> Times:
    """Median and percentiles of times."""
    values = torch.tensor(times, dtype=torch.float64)
    p20, median, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Times(median, p20, p80, len(times))
