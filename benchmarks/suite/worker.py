"""One case in a process of its own: what it allocates, breaks or is killed for ends with it. Started by run.py; writes one JSON."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.baselines.memory import available_memory
from benchmarks.harness.environment import stamp, steady_allocator
from benchmarks.harness.timing import Timing, compare, quantile
from benchmarks.scenarios.case import Case, Result, Roofs
from benchmarks.suite.machine import sensors, thermal_notes

OUT_OF_MEMORY = 77  # exit status


def confine(device: str, parent: int) -> None:
    """Let this process fail before the machine does: the kernel's killer takes it first, and on a CPU an allocation beyond
    nine tenths of what is free now raises, where it would otherwise drive the machine into swap."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive the command that started it
    if os.getppid() != parent:  # which may have ended before
        sys.exit("the command that started this worker is gone")
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if device == "cpu":  # a CUDA context maps far more than it uses
        ours = sum(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = 1024 * ours + int(0.9 * available_memory())
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def drift(samples: Sequence[float]) -> float | None:
    """Median of the last third of the samples over that of the first; None below 9 samples."""
    third = len(samples) // 3
    return None if third < 3 else quantile(samples[-third:], 0.5) / quantile(samples[:third], 0.5)


def drifted(samples: Sequence[float]) -> bool:
    """A change of more than 5% that no overlap of the two thirds (p20 .. p80) explains."""
    change = drift(samples)
    if change is None or abs(change - 1) <= 0.05:
        return False
    third = len(samples) // 3
    first, last = samples[:third], samples[-third:]
    return quantile(last, 0.2) > quantile(first, 0.8) or quantile(last, 0.8) < quantile(first, 0.2)


def timing_of(result: Result) -> Timing:
    """As far as a comparison needs it: seconds a unit, since a call of one model may yield more than one of another."""
    return Timing(result.entry, "", "", 0.0, 1, [s / result.units for s in result.samples], result.rounds, 1, 0)


def ratios(results: Sequence[Result]) -> list[dict]:
    """Time a unit of an entry / of the first one measured, from the rounds that both ran in; entries of other rounds are left out."""
    ran = [r for r in results if r.record is not None]
    rows = []
    for r in ran[1:]:
        if r.group == ran[0].group:
            ratio = compare(timing_of(r), timing_of(ran[0]))
            known = ratio.high < float("inf")  # too few rounds give no interval
            rows.append(
                {
                    "entry": r.entry, "against": ran[0].entry, "ratio": ratio.median, "low": ratio.low if known else None,
                    "high": ratio.high if known else None, "rounds": ratio.rounds, "verdict": ratio.verdict if known else "too few rounds",
                }
            )  # fmt: skip
    return rows


def entry_of(result: Result) -> dict:
    """A result with what its samples tell. The environment of the record is the run's and is kept once."""
    fields = result.to_dict()
    record = result.record
    fields |= {"rate": result.rate, "limit_rate": result.limit_rate, "fraction": record and record.fraction, "drift": drift(result.samples)}
    fields["notes"] = [record.note] if record and record.note else []
    if drifted(result.samples):
        word = "slower" if fields["drift"] > 1 else "faster"
        fields["notes"].append(f"the last third of the rounds was {abs(fields['drift'] - 1):.0%} {word} than the first")
    if record is not None:
        fields["record"] = {k: v for k, v in fields["record"].items() if k not in ("environment", "note")}
    return fields


def backends_used() -> list[dict]:
    """Calls by op and backend, counted inside the implementations; [] when no kernel of ours ran."""
    package = sys.modules.get("cobra_kernels")
    counts = package.call_counts() if package is not None else {}
    return [{"op": op, "backend": backend, "calls": calls} for (op, backend), calls in sorted(counts.items()) if calls]


def measure_case(case: Case, roofs: Roofs, seconds: float | None, seed: int) -> dict:
    before = sensors(case.device)
    environment = stamp(case.device)
    results = case.run(roofs, seconds=seconds, seed=seed, say=lambda text: print(text, flush=True), environment=environment)
    after = sensors(case.device)
    return {
        "date": environment["date"], "sensors": {"before": before, "after": after}, "notes": thermal_notes(before, after),
        "results": [entry_of(r) for r in results], "ratios": ratios(results), "backends": backends_used(),
    }  # fmt: skip


def find(cases: Iterable[Case], name: str) -> Case:
    return next(case for case in cases if case.id == name)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.suite.worker", description=__doc__)
    p.add_argument("what", choices=("roofs", "case"))
    p.add_argument("--scenarios", required=True)
    p.add_argument("--preset", required=True)
    p.add_argument("--device", required=True)
    p.add_argument("--case")
    p.add_argument("--roofs", type=json.loads, help="as JSON")
    p.add_argument("--seconds", type=float)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--parent", type=int, required=True, help="process id of the command")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    import torch

    steady_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    confine(args.device, args.parent)
    try:
        if args.what == "roofs":
            found = asdict(importlib.import_module(args.scenarios).machine(args.device))
        else:
            case = find(importlib.import_module(args.scenarios).cases(args.preset, args.device), args.case)
            found = measure_case(case, Roofs(**args.roofs), args.seconds, args.seed)
    except Exception as error:
        if not out_of_memory(error):
            raise
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'out of memory'}", file=sys.stderr)
        return OUT_OF_MEMORY
    args.out.write_text(json.dumps(found, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
