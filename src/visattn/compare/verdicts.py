"""The words of the report: what an interval allows to be said, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from visattn.compare.statistics import Interval

__all__ = ["join_words", "number", "signed", "verdict"]


def number(value: float) -> str:
    """A value in points with one decimal, or as many as it takes to show that it is not zero."""
    for decimals in (1, 2, 3):
        text = f"{value:.{decimals}f}"
        if float(text) != 0:
            return text
    return "0.0"


def signed(value: float) -> str:
    """`number` with its sign, for a difference."""
    text = number(value)
    return text if text.startswith("-") else f"+{text}"


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def verdict(plain: Interval, control: Interval | None, *, planned: int, control_name: str = "the control block") -> str:
    """The verdict on one arm in words.

    Args:
        plain: Paired differences to the plain network, in points.
        control: Paired differences to the control arm, in points; None where there is nothing to say about it.
        planned: How many seeds were planned.
        control_name: How to call the control arm.
    """
    text = _clause(plain, "plain", planned)
    if control is None:
        return text
    against = _clause(control, control_name, planned)
    if plain.count == 0 or control.count == 0 or text.startswith("no verdict") or against.startswith("no verdict"):
        return f"{text}; {against}"
    return f"{text}, {'and' if control.outcome == plain.outcome else 'but'} {against}"


def _clause(difference: Interval, other: str, planned: int) -> str:
    seeds = f"{difference.count} paired seed{'' if difference.count == 1 else 's'}"
    if difference.count < planned:
        seeds += f" of {planned} planned"
    if difference.count == 0:
        return f"no verdict against {other} (no seed finished in both)"
    if difference.low is None or difference.high is None:
        if difference.count == 1:
            return (
                f"no verdict against {other} "
                f"(difference {signed(difference.mean)} points, {seeds}: one seed gives no interval)"
            )
        if number(difference.mean) == "0.0":
            return f"not distinguishable from {other} (difference 0.0 points in each of {seeds})"
        return (
            f"no verdict against {other} (difference {signed(difference.mean)} points in each of {seeds}: "
            f"no spread, no interval)"
        )
    if difference.low > 0:
        size, low, high = difference.mean, difference.low, difference.high
        return f"better than {other} by {number(size)} points, 95% CI {number(low)} to {number(high)}, {seeds}"
    if difference.high < 0:
        size, low, high = -difference.mean, -difference.high, -difference.low
        return f"worse than {other} by {number(size)} points, 95% CI {number(low)} to {number(high)}, {seeds}"
    return (
        f"not distinguishable from {other} (difference {signed(difference.mean)} points, "
        f"95% CI {number(difference.low)} to {number(difference.high)}, {seeds})"
    )
