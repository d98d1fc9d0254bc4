"""Scenarios of known work, for the tests of `cobra bench`: the interface of benchmarks.scenarios, no model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch

from benchmarks.baselines.memory import available_memory
from benchmarks.harness.bench import Cost
from benchmarks.harness.timing import Provider
from benchmarks.scenarios.case import Case, Entry, Roofs

SCENARIOS = {"step": "sleeps of a few milliseconds", "crash": "a model that ends the process", "wide": "a model larger than memory"}


def machine(device: str) -> Roofs:
    return Roofs(10e9, 100e9, None)


def entry(model: str, make: Callable[[], Callable[[], object]], *, setting: str = "best", size: int = 10_000_000) -> Entry:
    name = model if setting == "best" else f"{model}, {setting}"
    return Entry(model, setting, Cost(size), 1.0, 0, 0, {}, lambda: Provider(name, make(), comparable=False))


def sleeper(seconds: float) -> Callable[[], Callable[[], None]]:
    return lambda: lambda: time.sleep(seconds)


def case(scenario: str, parameters: dict, *entries: Entry, unit: str = "tokens", seconds: float = 0.06) -> Case:
    return Case(scenario, "call", "cpu", "fp32", parameters, unit, entries, seconds=seconds)


def die():
    os.kill(os.getpid(), signal.SIGSEGV)


def take_too_much():
    """Untouched, so that it costs nothing where nothing stops it."""
    return torch.empty(int(0.97 * available_memory()), dtype=torch.uint8).numel


def cases(preset: str, device: str) -> list[Case]:
    users = entry("peer", sleeper(0.003), setting="as users run it")
    return [
        case("step", {"batch": 1, "context": 1024}, entry("ours", sleeper(0.001)), entry("peer", sleeper(0.002)), users),
        case("step", {"batch": 1, "context": 4096}, entry("ours", sleeper(0.001)), entry("peer", sleeper(0.004))),
        case("crash", {"batch": 1}, entry("ours", die), unit="answers"),
        case("wide", {"batch": 1}, entry("ours", sleeper(0.001)), entry("peer", take_too_much), unit="answers"),
    ]
