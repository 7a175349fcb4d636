"""How far a result may be from the true one: the only tolerances of the project.

In float64 a result equals the expected one to one part in 10^10. In a lower precision the permitted distance is not a
number somebody chose: it is measured. The readable reference implementation runs in the same precision on the same
numbers, and what it loses against float64 says what that precision is worth for this very computation.

One run can be lucky or unlucky: a gradient that cancels, or one behind a ReLU near zero, may come out ten times better
or worse after a change of the inputs by one rounding step. So where one run exceeds its budget, both implementations
run on such neighbouring inputs too (`nudge`), and the average deviation has to be within the average budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = [
    "FLOAT64_TOLERANCE",
    "NEIGHBOURS",
    "assert_close_to_exact",
    "budget",
    "budget_used",
    "deviation",
    "nudge",
    "relative_error",
]

FLOAT64_TOLERANCE = 1e-10
NEIGHBOURS = 16  # so many neighbouring inputs tell bad luck from a loss that is systematic


def deviation(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference between a result and the exact one.

    Both are compared in float64 on the CPU. NaN has to be where the exact result has NaN, an infinity where it has the
    same infinity.

    Args:
        actual: The result.
        exact: What it should be.

    Returns:
        The largest absolute difference; infinite if the shapes differ or a NaN or infinity is out of place.
    """
    if actual.shape != exact.shape:
        return math.inf
    got, want = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, exact))
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(
        got[~finite].nan_to_num(nan=0.0), want[~finite].nan_to_num(nan=0.0)
    ):
        return math.inf
    difference = (got - want)[finite].abs()
    return float(difference.max()) if difference.numel() else 0.0


def _size(exact: Tensor) -> float:
    """Largest finite magnitude in a tensor."""
    values = exact.detach().to("cpu", torch.float64).abs()
    values = values[values.isfinite()]
    return float(values.max()) if values.numel() else 0.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation of a result, relative to the size of the expected one.

    The size is the largest expected magnitude, but not less than 1.

    Args:
        actual: The result.
        expected: What it should be.

    Returns:
        The relative error; infinite for a wrong shape or a misplaced NaN or infinity.
    """
    return deviation(actual, expected) / max(1.0, _size(expected))


def nudge(tensor: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Move each number by one rounding step of `dtype`, up, down or not at all.

    Args:
        tensor: Inputs or parameters; anything but floating-point numbers is returned as it is.
        dtype: Precision under test.
        seed: Which neighbour.

    Returns:
        The neighbouring numbers, in the dtype of `tensor`.
    """
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    return tensor * (1 + torch.finfo(dtype).eps * steps)


def budget(low_reference: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest absolute deviation from the exact result that a computation in `dtype` may have.

    Twice what the reference implementation loses in that precision, plus one rounding step of the largest exact
    magnitude. Where the reference overflows it says nothing about the precision, and only the rounding step remains:
    an infinite loss never becomes an infinite budget.

    Args:
        low_reference: Result of the reference implementation in `dtype`.
        exact: Result of the reference implementation in float64 from the same (rounded) inputs and parameters.
        dtype: Precision under test.

    Returns:
        The permitted absolute deviation.
    """
    loss = deviation(low_reference, exact)
    return torch.finfo(dtype).eps * _size(exact) + (2.0 * loss if math.isfinite(loss) else 0.0)


def budget_used(runs: Iterable[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> float:
    """Average deviation of some runs as a share of their average budget.

    Args:
        runs: Of each run: the result under test, `low_reference` and `exact` (see `budget`).
        dtype: Precision under test.

    Returns:
        At most 1 if the results are as close as the precision allows.
    """
    distance = allowed = 0.0
    for actual, low_reference, exact in runs:
        distance += deviation(actual, exact)
        allowed += budget(low_reference, exact, dtype)
    if allowed == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / allowed


def assert_close_to_exact(
    actual: Tensor,
    exact: Tensor,
    low_reference: Tensor | None = None,
    label: str = "result",
    *,
    dtype: torch.dtype | None = None,
    neighbours: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]] | None = None,
) -> None:
    """Raise unless a result is as close to the exact one as its precision allows.

    Args:
        actual: The result under test.
        exact: Float64 result of the reference implementation from the same inputs and parameters.
        low_reference: Result of the reference implementation in the precision under test; not used in float64.
        label: What is compared, for the message.
        dtype: Precision under test; by default that of `actual` (give it where autocast returns float32).
        neighbours: Gives (actual, low_reference, exact) for `NEIGHBOURS` neighbouring inputs; called only if this run
            exceeds its budget.

    Raises:
        AssertionError: The result is too far away; the message says how far, and what was allowed.
        ValueError: A precision below float64 without `low_reference`.
    """
    dtype = actual.dtype if dtype is None else dtype
    if dtype == torch.float64:
        error = relative_error(actual, exact)
        if not error < FLOAT64_TOLERANCE:
            raise AssertionError(f"{label}: relative error {error:.3g}, allowed {FLOAT64_TOLERANCE:.0e} (float64)")
        return
    if low_reference is None:
        raise ValueError(f"assert_close_to_exact: {dtype} needs low_reference, the reference's result in {dtype}")
    runs = [(actual, low_reference, exact)]
    used = budget_used(runs, dtype)
    if used > 1.0 and neighbours is not None:
        used = budget_used([*runs, *neighbours()], dtype)
    if not used <= 1.0:
        distance = f"deviation {deviation(actual, exact):.3g}, {used:.3g} times the budget"
        raise AssertionError(f"{label}: {distance} ({dtype}, {tuple(exact.shape)})")
