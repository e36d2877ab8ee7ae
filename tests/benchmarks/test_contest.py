"""How contests are run: who takes part, how often, and what the clocks count."""

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def contest(monkeypatch):
    """benchmarks/contest.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.delitem(sys.modules, "contest", raising=False)
    import contest

    yield contest
    sys.modules.pop("contest")


class Runs:
    """A clock that a run moves on by its own seconds, and pytest-benchmark's part in a contest."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def run(self, name, seconds, value=1.0):
        def run():
            self.now += seconds
            self.order.append(name)
            return torch.full((2, 3, 4), value)

        return run

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def test_peers_run_beside_ours_until_their_time_is_used(contest):
    runs = Runs()

    def broken():
        raise RuntimeError("no such kernel\nand more")

    peers = {
        "fast": runs.run("fast", 1.0),
        "slow": runs.run("slow", 50.0),
        "wrong": runs.run("wrong", 1.0, value=1.5),
        "unstable": runs.run("unstable", 1.0, value=float("nan")),
        "broken": broken,
        "missing": "it cannot be imported",
    }
    made = contest.Contest(("op",), runs.run("ours", 2.5), peers, 8, 8)
    timings = contest.compare(made, "float32", runs)
    assert timings["missing"].absent == "it cannot be imported"
    assert timings["broken"].absent == "it failed: RuntimeError: no such kernel"
    assert timings["wrong"].absent == "its result differs from ours by 5.0e-01 of the largest value"
    assert "differs from ours by nan" in timings["unstable"].absent
    runs.order.clear()
    contest.race(made, timings, runs, runs, budget=10.0)
    assert runs.order == ["fast", "slow", "ours", *["fast", "ours"] * 4]
    assert timings["fast"].seconds == [1.0] * 4 and timings["slow"].seconds == [50.0]
    assert not timings["wrong"].seconds


def test_a_peer_that_runs_once_is_timed_where_it_is_compared(contest):
    runs = Runs()
    peers = {"once": runs.run("once", 50.0), "twice": runs.run("twice", 1.0)}
    made = contest.Contest(("op",), runs.run("ours", 2.0), peers, 8, 8, once=("once",))
    timings = contest.compare(made, "float32", runs)
    contest.race(made, timings, runs, runs, budget=3.0)
    assert runs.order.count("once") == 1 and timings["once"].seconds == [50.0]
    assert timings["twice"].seconds == [1.0] * 3


def test_quantiles_are_interpolated(contest):
    assert contest.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert contest.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert contest.quantile([4.0], 0.8) == 4.0


def test_the_clock_of_a_device_counts_between_a_run_and_its_end(contest, monkeypatch):
    times = iter([5.0, 7.5, 100.0, 101.0])  # ms

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(times)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(contest, "_cache_filler", lambda: torch.ones(1))
    clock = contest.CudaClock()
    spans = []
    for _ in range(2):
        start = clock()
        spans.append(clock() - start)
    assert spans == pytest.approx([2.5e-3, 1e-3])
