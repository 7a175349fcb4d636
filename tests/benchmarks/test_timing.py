import pytest
import torch

from visattn.benchmarks.timing import WARM_SECONDS, Timed, interleave, summarise

CPU = torch.device("cpu")


class Clock:
    """Time passes only when something runs."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def timed(self, name, seconds, warm=False):
        def run():
            self.log.append(name)
            self.now += seconds

        def prepare():
            self.now += 100 * WARM_SECONDS  # must not show in any time

        return Timed(run, prepare, warm)


def test_contenders_take_turns_after_all_are_warm():
    clock = Clock()
    times = interleave([clock.timed("a", 0.25), clock.timed("b", 0.5)], CPU, least=2, most=2, clock=clock)
    assert clock.log == ["a", "b", "a", "b", "a", "b"]
    assert times == [[250.0, 250.0], [500.0, 500.0]]


def test_what_has_run_before_is_not_warmed():
    clock = Clock()
    interleave([clock.timed("a", 1.0, warm=True), clock.timed("b", 1.0)], CPU, least=1, most=1, clock=clock)
    assert clock.log == ["b", "a", "b"]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (35.0, 7), (1e9, 50)])
def test_rounds_follow_the_time_between_least_and_most(seconds, rounds):
    clock = Clock()
    two = [Timed(clock.timed("a", 5.0).run, warm=True), Timed(clock.timed("b", 5.0).run, warm=True)]
    times = interleave(two, CPU, seconds=seconds, clock=clock)
    assert [len(own) for own in times] == [rounds, rounds]


def test_median_and_percentiles():
    times = summarise([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (times.median, times.p20, times.p80, times.runs) == (3.5, 2.0, 5.0, 6)
