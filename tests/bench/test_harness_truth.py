"""What `cobra bench` reports is true: work of a known duration, run as a case, comes back within 5%; a planted 10% slowdown is found,
between two models of a case and between two runs; two equals are not told apart.

A shared machine gets a few attempts at each: a right instrument passes one of them, a wrong one none. Verdicts are made on the clock
of the own thread, where a neighbour does not count."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.scenarios.case import Case
from benchmarks.suite import compare, worker
from tests.bench.fake_scenarios import case, entry, machine, sleeper
from tests.bench.runs import ENVIRONMENT
from tests.test_harness import ThreadTimer, eventually, spin


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """The environment costs git its time, and is tested elsewhere."""
    monkeypatch.setattr(worker, "stamp", lambda device: ENVIRONMENT)
    gc.freeze()  # a measurement begins with a collection: of what the test made, not of torch
    yield
    gc.unfreeze()


def run(case: Case, seconds: float) -> dict:
    """The journal's part of a case, from the very function that the worker runs."""
    return worker.measure_case(case, machine("cpu"), seconds, 0)


def timed(work) -> tuple[Case, list[float]]:
    """A case of `work`, and what its calls took by a clock of their own."""
    took = []

    def call():
        start = time.monotonic()
        work()
        took.append(time.monotonic() - start)

    return case("known", {"batch": 1}, entry("ours", lambda: call)), took


def reported_and_real(work, seconds: float) -> tuple[float, float]:
    known, took = timed(work)
    result = run(known, seconds)["results"][0]
    calls = len(result["samples"]) * result["record"]["calls_per_block"]
    return sum(result["samples"]) * result["record"]["calls_per_block"] / calls, sum(took[-calls:]) / calls


def test_a_known_sleep_comes_back_within_5_percent():
    def attempt():
        got, want = reported_and_real(lambda: time.sleep(0.004), 0.15)
        return want >= 0.004 and abs(got / want - 1) < 0.05, (got, want)

    eventually(attempt, "4 ms sleeps")


def test_a_known_copy_comes_back_within_5_percent():
    source = torch.ones(4 << 20)
    target = torch.empty_like(source)

    def attempt():
        got, want = reported_and_real(lambda: target.copy_(source), 0.15)
        return abs(got / want - 1) < 0.05, (got, want)

    eventually(attempt, "16 MiB copies")


def burner(seconds: float):
    return lambda: spin(seconds, time.thread_time)


def test_a_planted_slowdown_between_two_models_is_found_and_two_equals_are_same(monkeypatch):
    monkeypatch.setattr(timing, "timer_for", lambda device: ThreadTimer())

    def attempt():
        models = [entry("ours", burner(4e-4)), entry("twin", burner(4e-4)), entry("slow", burner(4.4e-4))]
        twin, slow = run(case("burn", {"batch": 1}, *models), 0.12)["ratios"]
        assert (twin["entry"], slow["entry"]) == ("twin", "slow")
        good = slow["verdict"] == "slower" and 1.05 < slow["ratio"] < 1.15 and slow["low"] > 1
        return good and twin["verdict"] == "same", (slow, twin)

    eventually(attempt, "10% slowdown in a case")


def test_a_planted_slowdown_between_two_runs_is_found_and_a_a_is_not(monkeypatch):
    monkeypatch.setattr(timing, "timer_for", lambda device: ThreadTimer())

    def a_run(seconds: float) -> dict:
        return {"cases": [run(case("burn", {"batch": 1}, entry("ours", burner(seconds))), 0.12)]}

    def attempt():
        before, again, slower = a_run(4e-4), a_run(4e-4), a_run(4.4e-4)
        [same], [slow], [fast] = (compare.pairs(*runs) for runs in ((again, before), (slower, before), (before, slower)))
        good = slow.verdict == "slower" and 1.05 < slow.ratio.median < 1.15 and fast.verdict == "faster"
        return good and same.verdict == "same", (same, slow)

    eventually(attempt, "10% slowdown between runs")


def test_a_rate_and_a_fraction_follow_from_the_median():
    result = run(case("known", {"batch": 1}, entry("ours", sleeper(0.002), size=10_000_000)), 0.05)["results"][0]
    median = result["record"]["median"]
    assert result["rate"] == 1 / median and result["limit_seconds"] == 1e-3 and result["fraction"] == pytest.approx(1e-3 / median)


@pytest.mark.parametrize("called, calls", [(False, 5), (True, 4)])
def test_a_long_call_that_compiles_nothing_is_warm_after_one(called, calls):
    made = []
    provider = timing.Provider("long", lambda: (time.sleep(1.1 * timing.LONG_CALL), made.append(1))[1])
    found = timing.measure([provider], seconds=0.1, called=called)["long"]
    assert len(made) == calls and len(found.samples) == 3
