"""One side of `python -m benchmarks --base`: a process that takes its samples when it is told to.

Its working directory decides whose `cobra_kernels` it imports. It answers every line of JSON on stdin with one on stdout:

    {"do": "start", "module": .., "backend": ..}   {"package": folder, "cases": [[op, title, provider], ..]}
    {"do": "prepare", "case": index}               {"estimate": seconds of one block} | {"error": ..}
    {"do": "sample"}                               {"seconds": of one call, "calls": ..}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.harness.bench import Case, parser
from benchmarks.harness.environment import steady_allocator
from benchmarks.harness.timing import Provider, Ring, Runner, timer_for

BLOCK_SECONDS = 0.01


def cases_in(module: ModuleType) -> list[tuple[str, Case]]:
    """(op, case) of every case that a bench has on a CPU."""
    name = module.__name__.rpartition("bench_")[2]
    makers = getattr(module, "CASES", None) or {name: module.cases}
    return [(op, case) for op, make in makers.items() for case in make(parser(op).parse_args([]))]


def chosen(case: Case, backend: str | None) -> Provider | None:
    """The provider that is compared: the named one; else the cpu backend, else the first, which is ours."""
    if backend is None:
        return next((p for p in case.providers if p.name == "cpu"), case.providers[0])
    return next((p for p in case.providers if p.name == backend), None)


class Side:
    def __init__(self) -> None:
        self.cases: list[tuple[str, Case, Provider]] = []
        self.runner: Runner | None = None

    def start(self, module: str, backend: str | None, quick: bool) -> dict:
        import cobra_kernels

        found = [(op, case, chosen(case, backend)) for op, case in cases_in(importlib.import_module(module)) if case.quick or not quick]
        self.cases = [entry for entry in found if entry[2] is not None]
        names = [[op, case.title, provider.name] for op, case, provider in self.cases]
        return {"package": str(Path(cobra_kernels.__file__).resolve().parent), "cases": names}

    def prepare(self, case: int) -> dict:
        self.runner = None  # the buffers of the case before
        _, which, provider = self.cases[case]
        ring = Ring.make(provider.make_inputs or which.make_inputs, which.cache)
        self.runner = Runner(provider, ring, timer_for("cpu"))
        self.runner.warm_up(BLOCK_SECONDS, warm_up_seconds=0.2)
        return {"estimate": self.runner.estimate}

    def sample(self) -> dict:
        if self.runner.estimate < 0.1:
            self.runner.block()  # while the other side ran, this one's threads fell asleep and its code left the caches
        self.runner.sample(0)
        return {"seconds": self.runner.samples[-1], "calls": self.runner.calls}


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a bench prints is no answer
    steady_allocator()
    side = Side()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(side, command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
