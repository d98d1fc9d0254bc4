"""The frame of one bench_<op>.py: its cases are checked, timed against the roof of the same run, printed and recorded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import records as store
from benchmarks.harness.environment import stamp, steady_allocator
from benchmarks.harness.records import Record
from benchmarks.harness.table import bytes_text, figures, print_table, seconds_text
from benchmarks.harness.timing import CpuTimer, Provider, measure

BACKENDS = ("reference", "cpu", "triton", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Largest L2-relative difference from the first provider that is still the same result in this dtype.
AGREEMENT = {"fp64": 1e-9, "fp32": 1e-4, "fp16": 4e-3, "bf16": 3e-2}


@dataclass(frozen=True)
class Cost:
    """The least that any implementation must do: bytes read and written once, FLOPs, exponentials."""

    bytes: int
    flops: int = 0
    exps: int = 0


@dataclass(frozen=True)
class Case:
    """One row group of the table. `make_inputs(index)` is deterministic in `index`: it makes the rotating buffers, and the
    same inputs for the check that all providers compute the same thing before any of them is timed."""

    mode: str
    dtype: str
    shape: str
    dims: dict[str, int]
    cost: Cost
    roof: str  # "copy", "read", "matmul", "exp", or "" when none applies
    make_inputs: Callable[[int], tuple]
    providers: Sequence[Provider]
    cache: str = "cold"
    goal: float | None = None  # seconds; in place of a roof, for what is not bound by bytes or arithmetic
    quick: bool = False

    @property
    def title(self) -> str:
        return f"{self.mode} {self.dtype} {self.shape}"


@dataclass
class Bench:
    """What run_bench hands back: records, what was left out and why, and what was wrong."""

    records: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def backend_providers(op: str, call: Callable[..., Any], names: Iterable[str] = BACKENDS, device: str = "cpu") -> list[Provider]:
    """One provider per backend that this machine has for `device`: call(*inputs, backend=name)."""
    from cobra_kernels import backends

    have = backends()
    serves = ("reference", "cpu") if device == "cpu" else ("cuda", "triton")

    def bound(name: str) -> Callable[..., Any]:
        return lambda *inputs: call(*inputs, backend=name)

    ordered = names if device == "cpu" else serves  # on a GPU the fastest first: the others are compared with it
    return [Provider(name, bound(name)) for name in ordered if name in serves and have[name] is None]


def tensors_of(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for item in result for t in tensors_of(item)] if isinstance(result, (list, tuple)) else []


def disagreement(result: Any, expected: Any) -> float:
    """Largest L2-relative difference over the tensors of two results; inf when they are not shaped alike or not finite."""
    got, want = tensors_of(result), tensors_of(expected)
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want):
        a, b = a.detach().double(), b.detach().double()
        error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        worst = max(worst, float("inf") if math.isnan(error) else error)
    return worst


def parser(op: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=f"bench_{op}", description=f"Benchmark of {op}.")
    p.add_argument("--backend", action="append", metavar="NAME", help="only this provider (repeatable)")
    p.add_argument("--shape", action="append", metavar="NAME", help="only this shape (repeatable)")
    p.add_argument("--dtype", action="append", choices=sorted(DTYPES), help="only this dtype (repeatable)")
    p.add_argument("--mode", action="append", metavar="NAME", help="only this mode (repeatable)")
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    p.add_argument("--seconds", type=float, default=0.25, help="time per provider and case (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="order of the interleaving (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="the few cases marked quick, no provider with a slow first call")
    p.add_argument("--record", action="store_true", help="append to benchmarks/results/<device>/")
    p.add_argument("--json", type=Path, metavar="FILE", help="append the records to FILE too")
    p.add_argument("--list", action="store_true", help="list the cases and leave")
    return p


def selected(cases: Iterable[Case], args: argparse.Namespace) -> list[Case]:
    def keep(case: Case) -> bool:
        wanted = ((args.shape, case.shape), (args.dtype, case.dtype), (args.mode, case.mode))
        return all(not names or value in names for names, value in wanted) and (case.quick or not args.quick)

    return [case for case in cases if keep(case)]


def run_case(op: str, case: Case, args: argparse.Namespace, bench: Bench, environment: dict) -> None:
    from benchmarks import roofline
    from cobra_kernels import call_counts, reset_call_counts
    from cobra_kernels.errors import BackendUnavailable

    providers = []
    for provider in case.providers:
        if args.backend and provider.name not in args.backend:
            continue
        if args.quick and provider.slow_start:
            line = f"{provider.name}: its first call takes seconds, left out by --quick"
            bench.left_out += [line] * (line not in bench.left_out)
            continue
        providers.append(provider)
    if not providers:
        return
    reset_call_counts()
    synchronize = torch.cuda.synchronize if torch.device(args.device).type == "cuda" else lambda: None
    # The very first call of each provider, where compilation and lazy set-up land.
    first_calls: dict[str, float] = {}
    expected = None
    for provider in list(providers):
        inputs = (provider.make_inputs or case.make_inputs)(0)
        results: list[Any] = []
        try:
            first_calls[provider.name] = CpuTimer()(lambda p=provider, i=inputs, r=results: (r.append(p.call(*i)), synchronize()))
        except BackendUnavailable as error:
            bench.left_out.append(f"{case.title}: {error}")
            providers.remove(provider)
            continue
        result = results.pop()
        if not provider.comparable:
            continue
        if expected is None:
            expected = result
            continue
        error = disagreement(result, expected)
        if error > AGREEMENT[case.dtype]:
            bench.wrong.append(f"{case.title}: {provider.name} differs from {providers[0].name} by {error:.1e}; not timed")
            providers.remove(provider)
    del expected
    if not providers:
        return
    roof = roofline.roof_for(case.roof, case.cost, args.device)
    timings = measure(
        [*providers, *roof.providers], case.make_inputs, cache=case.cache, seconds=args.seconds, seed=args.seed,
        device=args.device, called=True,
    )  # fmt: skip
    counts = call_counts()
    clock = roofline.running_clock_mhz(args.device)
    if clock is not None:
        environment = {**environment, "sm_clock_mhz_in_run": clock}
    for provider in providers:
        if provider.name in BACKENDS and not counts.get((op, provider.name)):
            bench.wrong.append(f"{case.title}: backend {provider.name} never ran, something else was timed")
            continue
        timing = timings[provider.name]
        timing.first_call = first_calls[provider.name]
        roof_seconds, fraction = roof.judge(timing, timings) if case.goal is None else (case.goal, case.goal / timing.median)
        record = Record.of(
            timing, op=op, mode=case.mode, dtype=case.dtype, shape=case.shape, dims=case.dims, bytes=case.cost.bytes,
            flops=case.cost.flops, exps=case.cost.exps, roof=case.roof if case.goal is None else "goal",
            roof_seconds=roof_seconds, fraction=fraction, environment=environment,
        )  # fmt: skip
        if case.goal is None and fraction is not None and fraction > 1.1:
            above = "above its roof: other work slowed the roof down, the fraction is no result"
            record.note = f"{record.note}; {above}" if record.note else above
        bench.records.append(record)


def rows_of(records: Sequence[Record], last: dict[tuple, Record]) -> list[list[str]]:
    rows, previous, op = [], None, None
    for r in records:
        head = [r.mode, r.dtype, r.title]
        old = last.get(r.key)
        rows.append(
            [
                r.op if r.op != op else "",
                *(head if (op, head) != (r.op, previous) else [""] * len(head)),
                r.provider,
                seconds_text(r.median),
                f"{seconds_text(r.p20)} .. {seconds_text(r.p80)}",
                seconds_text(r.first_call),
                bytes_text(r.bytes) if r.bytes else "-",
                figures(r.gbps) if r.bytes else "-",
                f"{r.fraction:.0%} {r.roof}" if r.fraction is not None else "-",
                f"{r.median / old.median:.2f}x" if old else "-",
                r.cache + (" *" if r.note else ""),
            ]
        )
        previous, op = head, r.op
    return rows


COLUMNS = [
    ("op", "<"), ("mode", "<"), ("dtype", "<"), ("shape", "<"), ("provider", "<"), ("median", ">"), ("p20 .. p80", ">"),
    ("first call", ">"), ("bytes", ">"), ("GB/s", ">"), ("of roof", ">"), ("vs last", ">"), ("cache", "<"),
]  # fmt: skip


def show(op: str, bench: Bench, last: dict[tuple, Record], environment: dict) -> None:
    e = environment
    dirty = " + local changes" if e["dirty"] else ""
    print_table(
        f"{op} on {e['device']}, {e['threads']} threads, {e['cpu_level']}, torch {e['torch']}, "
        f"commit {e['commit'] or 'none'}{dirty}, load {e['load_average'][0]}",
        COLUMNS,
        rows_of(bench.records, last),
    )
    for record in bench.records:
        if record.note:
            print(f"* {record.mode} {record.dtype} {record.shape} {record.provider}: {record.note}")
    for line in bench.left_out:
        print(f"left out: {line}")
    for line in bench.wrong:
        print(f"WRONG: {line}")
    if e["load_average"][0] > 0.5 * e["cores"]:
        print(f"note: load average {e['load_average'][0]} on {e['cores']} cores: other work shared this machine")


def run_bench(op: str, make_cases: Callable[[argparse.Namespace], Iterable[Case]], argv: Sequence[str] | None = None) -> int:
    """Run one bench from the command line. Exit status 1 when a provider was wrong."""
    args = parser(op).parse_args(argv)
    steady_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = selected(make_cases(args), args)
    if args.list:
        for case in cases:
            print(f"{case.title}: {', '.join(p.name for p in case.providers)}")
        return 0
    if not cases:
        print(f"bench_{op}: no case fits the options; --list names them all")
        return 2
    environment = stamp(args.device)
    path = store.path_for(op, args.device)
    last = store.latest(store.load(path))
    bench = Bench()
    for case in cases:
        done = len(bench.records)
        run_case(op, case, args, bench, environment)
        if args.json:  # as it goes: what is measured outlives a run that is ended
            store.append(bench.records[done:], args.json)
    show(op, bench, last, environment)
    if args.record:
        store.append(bench.records, path)
        print(f"recorded: {path.relative_to(store.ROOT)}")
    return 1 if bench.wrong else 0

