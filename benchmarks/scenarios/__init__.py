"""Scenarios: Cobra and the LLaVA family at the same work, each next to the limit that its own shape sets on this machine.

    from benchmarks import scenarios

    roofs = scenarios.machine(device)                        # measured here: bytes/s, FLOP/s, exponentials/s
    for case in scenarios.cases("laptop", "cpu"):            # builds nothing yet
        for result in case.run(roofs):                       # one per entry: measured, or not run and why
            store(result.to_dict())

A case is one point of one scenario (decode at a context of 8192 tokens, say). Its entries are models at a setting:

    tinyllava-3.1b                        its best settings: SDPA, caches of the exact length, CUDA graphs, no dead vision block
    tinyllava-3.1b, torch.compile         the same, compiled, where that is tried
    tinyllava-3.1b, as users run it       transformers' own generate and dynamic cache, launched from Python, the whole tower

Entries that fit into memory together are measured in the same interleaved rounds (`benchmarks.harness.timing.measure`). What
does not fit, in memory or in time, is a result with status "not run", the reason, and its limit computed from the shape."""

from __future__ import annotations

from benchmarks.scenarios.case import Case, Entry, Limit, Result, Roofs, machine
from benchmarks.scenarios.catalogue import PRESETS, SCENARIOS, cases

__all__ = ["PRESETS", "SCENARIOS", "Case", "Entry", "Limit", "Result", "Roofs", "cases", "machine"]
