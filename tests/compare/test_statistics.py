from __future__ import annotations

import math

import pytest

from visattn.compare.statistics import Interval, mean_interval, paired_differences
from visattn.compare.verdicts import join_words, number, signed, verdict

# Student t quantiles at 97.5% from printed tables, by degrees of freedom.
T = {1: 12.7062, 2: 4.30265, 4: 2.77645}


@pytest.mark.parametrize(
    ("values", "mean", "deviation"),
    [([1.0, 3.0], 2.0, math.sqrt(2)), ([1.0, 2.0, 3.0], 2.0, 1.0), ([2.0, 4.0, 4.0, 4.0, 6.0], 4.0, math.sqrt(2))],
)
def test_interval_equals_the_textbook(values, mean, deviation):
    interval = mean_interval(values)
    half = T[len(values) - 1] * deviation / math.sqrt(len(values))
    assert interval.count == len(values)
    assert interval.mean == pytest.approx(mean)
    assert interval.low == pytest.approx(mean - half, rel=1e-4)
    assert interval.high == pytest.approx(mean + half, rel=1e-4)


def test_one_value_has_no_interval():
    assert mean_interval([0.3]) == Interval(0.3, None, None, 1)
    assert mean_interval([0.3]).outcome == "one seed"


def test_values_without_spread_have_no_interval():
    # 0.1 + 0.2 and 0.3 differ by rounding alone.
    interval = mean_interval([0.3, 0.1 + 0.2, 0.3])
    assert (interval.low, interval.high, interval.count) == (None, None, 3)
    assert interval.outcome == "identical"


def test_values_that_are_no_numbers_are_left_out_and_not_counted():
    assert mean_interval([1.0, math.nan, 2.0, math.inf, 3.0]) == mean_interval([1.0, 2.0, 3.0])
    assert mean_interval([math.nan]).count == 0
    assert mean_interval([]).outcome == "no pair"


def test_differences_pair_by_seed():
    first = {2: 0.9, 0: 0.5, 1: math.nan, 7: 0.1}
    second = {0: 0.25, 1: 0.5, 2: 0.5, 3: 0.5}
    assert paired_differences(first, second) == pytest.approx([0.25, 0.4])


def test_the_sign_of_the_bounds_decides():
    assert Interval(1.0, 0.1, 1.9, 3).outcome == "better"
    assert Interval(-1.0, -1.9, -0.1, 3).outcome == "worse"
    assert Interval(1.0, 0.0, 2.0, 3).outcome == "unclear"


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(1.8, 0.9, 2.7, 3), "better than plain by 1.8 points, 95% CI 0.9 to 2.7, 3 paired seeds"),
        (Interval(-1.8, -2.7, -0.9, 3), "worse than plain by 1.8 points, 95% CI 0.9 to 2.7, 3 paired seeds"),
        (
            Interval(0.3, -0.8, 1.4, 3),
            "not distinguishable from plain (difference +0.3 points, 95% CI -0.8 to 1.4, 3 paired seeds)",
        ),
        # A bound that rounds to zero but is not shows that it is not.
        (Interval(1.0, 0.02, 1.98, 3), "better than plain by 1.0 points, 95% CI 0.02 to 2.0, 3 paired seeds"),
        (
            Interval(0.8, None, None, 1),
            "no verdict against plain (difference +0.8 points, 1 paired seed of 3 planned: one seed gives no interval)",
        ),
        (Interval(math.nan, None, None, 0), "no verdict against plain (no seed finished in both)"),
        (
            Interval(1.5, None, None, 3),
            "no verdict against plain (difference +1.5 points in each of 3 paired seeds: no spread, no interval)",
        ),
        (
            Interval(0.0, None, None, 3),
            "not distinguishable from plain (difference 0.0 points in each of 3 paired seeds)",
        ),
        (
            Interval(-1.0, -1.5, -0.5, 2),
            "worse than plain by 1.0 points, 95% CI 0.5 to 1.5, 2 paired seeds of 3 planned",
        ),
    ],
)
def test_verdict_against_plain(interval, text):
    assert verdict(interval, None, planned=3) == text


BETTER, WORSE, UNCLEAR = Interval(1.8, 0.9, 2.7, 3), Interval(-1.8, -2.7, -0.9, 3), Interval(0.3, -0.8, 1.4, 3)


@pytest.mark.parametrize(
    ("plain", "control", "ending"),
    [
        (
            BETTER,
            UNCLEAR,
            "3 paired seeds, but not distinguishable from the control block of the same size "
            "(difference +0.3 points, 95% CI -0.8 to 1.4, 3 paired seeds)",
        ),
        (
            BETTER,
            BETTER,
            "3 paired seeds, and better than the control block of the same size by 1.8 points, "
            "95% CI 0.9 to 2.7, 3 paired seeds",
        ),
        (
            UNCLEAR,
            WORSE,
            "3 paired seeds), but worse than the control block of the same size by 1.8 points, "
            "95% CI 0.9 to 2.7, 3 paired seeds",
        ),
        (
            BETTER,
            Interval(math.nan, None, None, 0),
            "3 paired seeds; no verdict against the control block of the same size (no seed finished in both)",
        ),
    ],
)
def test_verdict_against_the_control(plain, control, ending):
    text = verdict(plain, control, planned=3, control_name="the control block of the same size")
    assert text.startswith(verdict(plain, None, planned=3))
    assert text.endswith(ending)


def test_numbers_in_words():
    assert [number(value) for value in (1.25, 0.04, 0.0004, -0.0, -0.04)] == ["1.2", "0.04", "0.0", "0.0", "-0.04"]
    assert [signed(value) for value in (0.3, -0.3, 0.0)] == ["+0.3", "-0.3", "+0.0"]
    assert [join_words(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
