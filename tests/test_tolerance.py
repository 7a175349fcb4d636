import math

import pytest
import torch

from visattn.testing.tolerance import (
    assert_close_to_exact,
    budget,
    budget_used,
    deviation,
    nudge,
    relative_error,
)

EXACT = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)


def test_deviation_is_the_largest_difference_and_infinite_for_another_shape_or_misplaced_nan():
    assert deviation(EXACT + torch.tensor([0.0, 0.25, -0.5]), EXACT) == 0.5
    assert deviation(EXACT[:2], EXACT) == math.inf
    nan = EXACT.clone()
    nan[1] = math.nan
    assert deviation(nan, EXACT) == math.inf
    assert deviation(EXACT, nan) == math.inf
    assert deviation(nan, nan) == 0.0
    assert deviation(torch.tensor([math.inf]), torch.tensor([-math.inf])) == math.inf
    assert deviation(torch.tensor([math.inf]), torch.tensor([math.nan])) == math.inf
    assert deviation(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


def test_relative_error_is_relative_to_the_size_but_not_below_one():
    assert relative_error(EXACT + 0.4, EXACT) == pytest.approx(0.1)
    assert relative_error(EXACT * 0 + 0.01, EXACT * 0) == pytest.approx(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budget_is_twice_the_loss_of_the_reference_plus_one_rounding_step(dtype):
    low = EXACT + torch.tensor([0.0, 0.125, 0.0])
    assert budget(low, EXACT, dtype) == pytest.approx(0.25 + 4.0 * torch.finfo(dtype).eps)


def test_an_overflowing_reference_leaves_the_rounding_step_alone():
    low = torch.tensor([math.inf, -4.0, 2.0])
    assert budget(low, EXACT, torch.float16) == 4.0 * torch.finfo(torch.float16).eps


def test_averages_decide_over_several_runs():
    lucky = (EXACT + 0.3, EXACT, EXACT)  # the reference lost nothing
    usual = (EXACT + 0.3, EXACT + 0.3, EXACT)
    assert budget_used([lucky], torch.float32) > 1e5
    assert budget_used([lucky, *[usual] * 3], torch.float32) == pytest.approx(4 / 6, rel=1e-5)
    three_times = (EXACT + 0.9, EXACT + 0.3, EXACT)
    assert budget_used([three_times] * 4, torch.float32) == pytest.approx(1.5, rel=1e-5)
    zero = torch.zeros(2, dtype=torch.float64)
    assert budget_used([(zero, zero, zero)], torch.float32) == 0.0
    assert budget_used([(zero + 1, zero, zero)], torch.float32) == math.inf


def test_nudge_moves_numbers_by_a_rounding_step_and_leaves_masks_alone():
    numbers = torch.full((50,), 3.0, dtype=torch.float64)
    moved = nudge(numbers, torch.bfloat16, seed=1)
    eps = torch.finfo(torch.bfloat16).eps
    assert set(moved.tolist()) == {3.0 * (1 - eps), 3.0, 3.0 * (1 + eps)}
    assert torch.equal(moved, nudge(numbers, torch.bfloat16, seed=1))
    assert not torch.equal(moved, nudge(numbers, torch.bfloat16, seed=2))
    mask = torch.tensor([True, False])
    assert nudge(mask, torch.bfloat16, seed=1) is mask


def test_assert_close_in_float64():
    assert_close_to_exact(EXACT + 1e-11, EXACT)
    with pytest.raises(AssertionError, match=r"grad_x: relative error 2\.5e-10, allowed 1e-10 \(float64\)"):
        assert_close_to_exact(EXACT + 1e-9, EXACT, label="grad_x")


def test_assert_close_in_a_lower_precision():
    exact = torch.linspace(-1, 1, 7, dtype=torch.float64) / 3
    low = exact.to(torch.bfloat16)
    assert_close_to_exact(low, exact, low)
    with pytest.raises(AssertionError, match=r"out: deviation 0\.5.*times the budget \(torch\.bfloat16, \(7,\)\)"):
        assert_close_to_exact(low + 0.5, exact, low, label="out")
    with pytest.raises(ValueError, match="needs low_reference"):
        assert_close_to_exact(low, exact)
    with pytest.raises(AssertionError, match="deviation inf"):
        assert_close_to_exact(low * math.nan, exact, low)


def test_neighbours_are_asked_only_where_one_run_exceeds_its_budget():
    asked = []

    def neighbours():
        asked.append(True)
        return [(EXACT + 0.3, EXACT + 0.3, EXACT)] * 3

    assert_close_to_exact(EXACT, EXACT, EXACT, dtype=torch.float32, neighbours=neighbours)
    assert not asked
    assert_close_to_exact(EXACT + 0.3, EXACT, EXACT, dtype=torch.float32, neighbours=neighbours)
    assert asked
    with pytest.raises(AssertionError, match="times the budget"):
        assert_close_to_exact(EXACT + 2.0, EXACT, EXACT, dtype=torch.float32, neighbours=neighbours)
