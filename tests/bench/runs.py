"""Results of a run made by hand, for the tests of its report and of comparisons: every kind of case and entry there is."""

from __future__ import annotations

import copy

from benchmarks.harness.timing import Timing
from benchmarks.scenarios.case import Case, Limit, Result
from benchmarks.suite import results, worker
from tests.bench.fake_scenarios import SCENARIOS, case, entry, machine, sleeper

SENSORS = {"pulse_seconds": 0.002, "load_average": 0.1}
IDENTITY = {
    "machine": "0123456789ab", "device": "Some <CPU> & more", "cores": 2, "cpu_level": "avx2", "threads": 2, "source": "0123456789ab",
    "torch": "2.13.0", "python": "3.11.2", "preset": "laptop", "scenarios": "tests.bench.fake_scenarios", "seconds": None, "seed": 0,
    "asked_device": "cpu", "asked_threads": 0, "cases": 5,
}  # fmt: skip
ENVIRONMENT = {
    "commit": "0123456789ab", "dirty": False, "date": "2026-01-02T03:04:05Z", "command": "python -m cobra bench", "cores": 2, "threads": 2,
    "device": "Some <CPU> & more", "cpu_level": "avx2", "torch": "2.13.0",
}  # fmt: skip


def measured(case: Case, index: int, samples: list[float]) -> Result:
    """The result of an entry whose blocks took `samples`."""
    e, roofs = case.entries[index], machine("cpu")
    timing = Timing(e.name, "perf_counter", "warm", 2 * samples[0], 1, samples, list(range(len(samples))), 1, 0)
    record = case._record(e, timing, 2 * samples[0], roofs, ENVIRONMENT)
    return case._result(e, Limit.of(e.cost, roofs), (record, timing, 0, None, ""), "")


def done(case: Case, found: list[Result]) -> dict:
    return {
        "kind": "case", "id": case.id, "scenario": case.scenario, "mode": case.mode, "note": case.note, "status": "done", "reason": "",
        "seconds": 1.5, "date": "2026-01-02T03:05:00Z", "sensors": {"before": SENSORS, "after": SENSORS}, "notes": [],
        "results": [worker.entry_of(r) for r in found], "ratios": worker.ratios(found),
        "backends": [{"op": "rms_norm", "backend": "cpu", "calls": 3}],
    }  # fmt: skip


def marked(case: Case, status: str, reason: str) -> dict:
    rows = [worker.entry_of(r) for r in case.lost(machine("cpu"), f"{status}: {reason}")]
    return {**done(case, []), "status": status, "reason": reason, "sensors": None, "date": None, "backends": [], "results": rows}


def a_run(name: str = "now", slower: float = 1.0) -> dict:
    """Three contexts of three models, the longest too much for one of them; a bar of one case; a case that crashed. One is missing."""
    models = [entry("ours", sleeper(0)), entry("peer <1>", sleeper(0)), entry("peer <1>", sleeper(0), setting="as users run it")]
    entries = [{"kind": "run", "identity": IDENTITY, "environment": ENVIRONMENT, "about": SCENARIOS}]
    entries.append({"kind": "roofs", "date": "2026-01-02T03:04:06Z", "roofs": vars(machine("cpu"))})
    wobble = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0, 1.0]
    for context in (256, 2048, 32768):
        point = case("step", {"batch": 1, "context": context}, *models)
        found = [measured(point, 0, [slower * 0.004 * w for w in wobble])]
        if context < 32768:
            found.append(measured(point, 1, [(0.003 + context * 1e-6) * w for w in wobble[:4]]))
            found.append(measured(point, 2, [0.02 * w for w in wobble] + [0.2]))
        else:
            found += point.lost(machine("cpu"), "needs 40.0 GB of memory, 8.00 GB are free")[1:]
        entries.append(done(point, found))
    wide = case("wide", {"batch": 1}, *models, unit="answers")
    entries.append(done(wide, [measured(wide, i, [(i + 1) * 0.01 * w for w in wobble]) for i in range(3)]))
    entries.append(marked(case("crash", {"batch": 1}, models[0], unit="answers"), "crashed", "ended by SIGSEGV"))
    return copy.deepcopy(results.collect(name, entries))
