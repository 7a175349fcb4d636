"""One line that says where a run is."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

__all__ = ["Progress", "duration"]

REFRESH = 0.2  # seconds between two drawings of the live line


def duration(seconds: float) -> str:
    """Seconds in words: `45s`, `3m 20s`, `2h 05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


class Progress:
    """A line with arm, seed, epoch, score and the time left: redrawn on a terminal, printed once an epoch elsewhere.

    Args:
        epochs: Epochs of each trial.
        trials: (arm, seed) still to be run.
        score: What the task calls its main score.
        stream: Where to; default stderr.
    """

    def __init__(
        self, epochs: int, trials: list[tuple[str, int]], score: str = "", stream: TextIO | None = None
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.epochs = epochs
        self.left = [arm for arm, _ in trials]
        self.total, self.number = len(trials), 0
        self.arm, self.seed, self.score, self.reached = "", 0, score, ""
        self.seconds: dict[str, list[float]] = {}  # of epochs, by arm
        self.drawn = 0.0

    def start(self, arm: str, seed: int) -> None:
        """A trial begins."""
        self.left.remove(arm)
        self.number += 1
        self.arm, self.seed, self.reached = arm, seed, ""

    def batch(self, epoch: int, step: int, steps: int) -> None:
        """A training step is done."""
        if self.live and time.monotonic() - self.drawn > REFRESH:
            self._draw(epoch, step / steps)

    def epoch(self, epoch: int, score: float, seconds: float) -> None:
        """An epoch is done."""
        self.seconds.setdefault(self.arm, []).append(seconds)
        self.reached = f"  {self.score} {100 * score:.1f}%"
        if self.live:
            self._draw(epoch, 1)
        else:
            print(self._line(epoch, 1), file=self.stream, flush=True)

    def message(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        """Wipe the live line."""
        if self.live and self.drawn:
            print("\r\x1b[2K", end="", file=self.stream, flush=True)

    def remaining(self, epoch: int, part: float) -> float | None:
        """Seconds until the run ends, from the epochs so far; None before the first."""
        every = [s for seconds in self.seconds.values() for s in seconds]
        if not every:
            return None
        typical = sum(every) / len(every)
        mean = {arm: sum(seconds) / len(seconds) for arm, seconds in self.seconds.items()}
        now = (self.epochs - (epoch - 1) - part) * mean.get(self.arm, typical)
        return now + sum(self.epochs * mean.get(arm, typical) for arm in self.left)

    def _line(self, epoch: int, part: float) -> str:
        left = self.remaining(epoch, part)
        eta = "" if left is None else f"  {duration(left)} left"
        return (
            f"trial {self.number}/{self.total}  {self.arm}  seed {self.seed}  epoch {epoch}/{self.epochs}"
            f"{self.reached}{eta}"
        )

    def _draw(self, epoch: int, part: float) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[2K{self._line(epoch, part)[:width]}", end="", file=self.stream, flush=True)
        self.drawn = time.monotonic()
