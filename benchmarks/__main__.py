"""python -m benchmarks                every bench, one process each, one table, records appended (at most 15 minutes)
python -m benchmarks --quick        the same with the quick cases only
python -m benchmarks room <op>      one room against the roof and its last record (seconds)
python -m benchmarks --base REF     the working tree against a commit: tests, two worktrees, interleaved processes, ratios (minutes)
python -m benchmarks list           the benches there are
python -m benchmarks adopt <file>   files the records of `--file` under benchmarks/results/<their device>/"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import base
from benchmarks.harness import records as store
from benchmarks.harness.bench import COLUMNS, rows_of
from benchmarks.harness.environment import ROOT, slug, stamp
from benchmarks.harness.table import print_table

HERE = Path(__file__).parent
LIMIT_SECONDS = 240  # of one bench
# On a GPU with little time the goals come first.
GPU_ONLY = ("ttft",)
GPU_ORDER = ("selective_scan", "causal_conv1d", "causal_conv1d_update", "selective_state_update", "rms_norm", "ttft", "projector", "train")


def benches() -> dict[str, str]:
    """Name -> module of every bench_<name>.py."""
    files = [*sorted(HERE.glob("ops/bench_*.py")), *sorted(HERE.glob("model/bench_*.py"))]
    return {f.stem.removeprefix("bench_"): f"benchmarks.{f.parent.name}.{f.stem}" for f in files}


def run_one(module: str, arguments: list[str], quiet: bool, limit: float = LIMIT_SECONDS) -> tuple[int, str]:
    """(exit status, output) of one bench in a process of its own; its output streams through unless quiet."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=False, timeout=max(limit, 1), text=True,
            stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"stopped after {limit:.0f} s"
    return done.returncode, done.stdout or ""


def run_all(args: argparse.Namespace, passed_on: list[str]) -> int:
    failures: list[tuple[str, int, str]] = []
    rows: list[list[str]] = []
    notes: list[str] = []
    began = time.monotonic()
    modules = benches()
    names = args.only or ([name for name in modules if name not in GPU_ONLY] if args.device == "cpu" else list(GPU_ORDER))
    with tempfile.TemporaryDirectory() as folder:
        for index, op in enumerate(names, 1):
            print(f"[{index}/{len(names)}] {op} ...", end="", flush=True)
            start = time.monotonic()
            left = args.within - (start - began)
            if left < 20:
                print(f" no time left of {args.within:.0f} s", flush=True)
                failures.append((op, 124, "not begun"))
                continue
            fresh = Path(folder) / f"{op}.jsonl" if args.file is None else args.file
            before = len(store.load(fresh))
            status, output = run_one(modules[op], ["--json", str(fresh), *passed_on], True, min(LIMIT_SECONDS, left))
            print(f" {time.monotonic() - start:.0f} s" + (f", exit {status}" if status else ""), flush=True)
            if status:
                failures.append((op, status, output))
            found = store.load(fresh)[before:]
            for name in dict.fromkeys(r.op for r in found):  # a bench may hold two ops
                path = store.path_for(name, args.device, args.results)
                mine, last = [r for r in found if r.op == name], store.latest(store.load(path))
                rows += rows_of(mine, last)
                if not args.no_record and args.file is None:
                    store.append(mine, path)
            notes += [f"{op}: {line}" for line in output.splitlines() if line.startswith(("left out:", "WRONG:"))]
    e = stamp(args.device)
    dirty = " + local changes" if e["dirty"] else ""
    title = f"{e['device']}, {e['threads']} threads, {e['cpu_level']}, torch {e['torch']}, commit {e['commit']}{dirty}"
    print_table(title, COLUMNS, rows)
    marked = sum(row[-1].endswith("*") for row in rows)
    if marked:
        print(f"* {marked} of {len(rows)} rows have outliers or a wide spread; each record says which in its note")
    for note in notes:
        print(note)
    for op, status, output in failures:
        print(f"\n{op} ended with exit status {status}; its last lines:")
        print("\n".join(output.splitlines()[-15:]))
    if args.file is not None:
        print(f"records: {args.file}")
    elif not args.no_record:
        print(f"records: {os.path.relpath(store.path_for('x', args.device, args.results).parent)}/; python -m benchmarks.readme puts them into the pages")
    print(f"{len(names) - len(failures)} of {len(names)} benches in {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


def adopt(file: Path, results: Path) -> int:
    """Appends each record to the file of its op and device."""
    records = store.load(file)
    for record in records:
        e = record.environment
        folder = slug(e["device"], None if "driver" in e else e["cores"])  # only a GPU has a driver
        store.append([record], results / folder / f"{record.op}.jsonl")
    print(f"{len(records)} records of {file} filed under {os.path.relpath(results)}/")
    return 0 if records else 1


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", nargs="?", choices=("all", "room", "list", "adopt"), default="all")
    p.add_argument("op", nargs="?", help="the room of `room`, the file of `adopt`")
    p.add_argument("--only", action="append", metavar="OP", help="only this bench (repeatable)")
    p.add_argument("--quick", action="store_true", help="the few cases marked quick, no provider with a slow first call")
    p.add_argument("--backend", action="append", metavar="NAME", help="only this provider (repeatable)")
    p.add_argument("--no-record", action="store_true", help="do not append to the results")
    p.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the records (default: benchmarks/results)")
    p.add_argument("--file", type=Path, help="append all records to this file, as they are measured, instead of the results")
    p.add_argument("--within", type=float, default=float("inf"), metavar="SECONDS", help="begin no bench that could not end by then")
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--base", metavar="REF", help="compare with a commit, on the CPU; without --only the rooms touched since")
    p.add_argument("--launches", type=int, default=3, metavar="N", help="of --base: pairs of fresh processes (default: %(default)s)")
    args = p.parse_args(argv)
    if args.what == "list":
        print("\n".join(benches()))
        return 0
    if args.what == "adopt":
        if args.op is None:
            p.error("adopt: the file is missing")
        return adopt(Path(args.op), args.results)
    passed_on = ["--device", args.device, *(f"--backend={name}" for name in args.backend or [])]
    if args.what == "room":
        if args.op not in benches():
            p.error(f"room: {args.op!r} has no bench; there are {', '.join(benches())}")
        return run_one(benches()[args.op], ["--quick", "--seconds", "0.15", *passed_on], quiet=False)[0]
    unknown = sorted(set(args.only or []) - set(benches()))
    if unknown:
        p.error(f"--only: {', '.join(unknown)} has no bench; there are {', '.join(benches())}")
    if args.base:
        if args.device != "cpu" or len(args.backend or []) > 1:
            p.error("--base: compares one provider (--backend) on the CPU")
        return base.run(args.base, args.only or [], backend=(args.backend or [None])[0], quick=args.quick, launches=args.launches)
    return run_all(args, [*passed_on, *(["--quick"] if args.quick else [])])


if __name__ == "__main__":
    raise SystemExit(main())
