"""cobra bench: Cobra next to the LLaVA family, every scenario of a preset against the limit of its own shape, with a report.

    cobra bench                                 what fits this machine; out/bench/<run>/report.html
    cobra bench                                 the same again: goes on where it was stopped, or says that all is done
    cobra bench --scenario decode-context       one scenario; the others may follow later, into the same report
    cobra bench --run after --compare before    two runs side by side, each ratio with its interval and a verdict
    cobra bench --preset paper --device cuda    the paper's protocol

Each case runs in a process of its own with a time limit: one that crashes, hangs or runs out of memory is marked and the run
goes on. Ctrl-C stops; nothing that was measured is lost."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.harness import records as store
from benchmarks.harness.environment import ROOT, slug, stamp
from benchmarks.harness.records import Record
from benchmarks.harness.table import print_table, seconds_text
from benchmarks.scenarios.case import Case, Roofs
from benchmarks.suite import compare, report, results
from benchmarks.suite.journal import Journal, JournalError
from benchmarks.suite.journal import read as read_journal
from benchmarks.suite.machine import identity, source
from benchmarks.suite.worker import OUT_OF_MEMORY, entry_of

PRESETS = ("laptop", "gpu", "paper")
FAILED = ("out of memory", "time limit", "crashed")
LIMIT = 600.0  # seconds of a case


class RunError(Exception):
    """What the user can change: the message names the option, what it has, and what was expected."""


# --- one case in its own process ----------------------------------------------------------------------------------------


WORKER = (sys.executable, "-m", "benchmarks.suite.worker")


def in_own_process(arguments: Sequence[str], limit: float, log: Path, command: Sequence[str] = WORKER) -> tuple[str, str, dict | None]:
    """(status, reason, what it wrote) of `command *arguments --out FILE`; its output goes to `log`, which stays when something
    went wrong. Ends the process and all that it started, at the limit or with this one."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))  # scenarios of one's own lie where one stands
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        out = Path(folder) / "result.json"
        worker = subprocess.Popen(
            [*command, *arguments, "--out", str(out)], cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            code = worker.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        found = json.loads(out.read_text()) if code == 0 else None
    if found is not None:
        log.unlink()
        return "done", "", found
    return *_ending(code, limit, log), None


def time_limit(case: Case, wanted: float | None) -> float:
    """Seconds after which a case is ended: `wanted`, else LIMIT or, if that is more, what its models may take together."""
    patience = case.patience * len(case.entries)
    return wanted or (max(LIMIT, patience) if math.isfinite(patience) else LIMIT)


def _ending(code: int | None, limit: float, log: Path) -> tuple[str, str]:
    lines = log.read_text(errors="replace").strip().splitlines()
    said = lines[-1].strip()[:200] if lines else ""
    if code is None:
        return "time limit", f"stopped after {limit:.0f} s (--limit)"
    if code == OUT_OF_MEMORY:
        return "out of memory", said
    if code == -signal.SIGKILL:
        return "out of memory", "killed by the system (SIGKILL), as it does when memory runs out"
    if code < 0:
        return "crashed", f"ended by {signal.Signals(-code).name}" + (f": {said}" if said else "")
    return "crashed", f"exit status {code}" + (f": {said}" if said else "")


class Runner:
    """Runs the cases that a journal lacks, one by one, and appends each as it ends."""

    def __init__(self, args: argparse.Namespace, folder: Path, journal: Journal) -> None:
        self.args, self.folder, self.journal = args, folder, journal
        self.common = ["--scenarios", args.scenarios, "--preset", args.preset, "--device", args.device]
        self.common += ["--threads", str(args.threads), "--parent", str(os.getpid())]

    def roofs(self) -> Roofs | None:
        """This machine's roofs, measured once per run; None when its device is not there."""
        if torch.device(self.args.device).type == "cuda" and not torch.cuda.is_available():
            return None
        for entry in self.journal.entries:
            if entry["kind"] == "roofs":
                return Roofs(**entry["roofs"])
        status, reason, found = in_own_process(["roofs", *self.common], self.args.limit or LIMIT, self.folder / "logs" / "roofs.txt")
        if found is None:
            raise RunError(f"the roofs of this machine could not be measured ({status}: {reason}); see {self.folder}/logs/roofs.txt")
        self.journal.append({"kind": "roofs", "roofs": found, "date": stamp("cpu")["date"]})
        return Roofs(**found)

    def case(self, case: Case, roofs: Roofs | None) -> dict:
        """The journal's entry of one case, whatever becomes of it."""
        entry = {"kind": "case", "id": case.id, "scenario": case.scenario, "mode": case.mode, "note": case.note}
        start = time.monotonic()
        if roofs is None:
            status, reason, found = "not run", f"torch sees no {torch.device(self.args.device).type} device", None
        else:
            a = self.args
            seconds = [] if a.seconds is None else ["--seconds", str(a.seconds)]
            fields = json.dumps(vars(roofs))
            status, reason, found = in_own_process(
                ["case", *self.common, "--case", case.id, "--roofs", fields, "--seed", str(a.seed), *seconds], time_limit(case, a.limit),
                self.folder / "logs" / f"{re.sub(r'[^A-Za-z0-9=,.-]+', '_', case.id)}.txt",
            )  # fmt: skip
        lost = {"date": None, "sensors": None, "notes": [], "ratios": [], "backends": []}
        found = found or {**lost, "results": self._lost(case, roofs, f"{status}: {reason}")}
        return {**entry, "status": status, "reason": reason, "seconds": round(time.monotonic() - start, 3), **found}

    @staticmethod
    def _lost(case: Case, roofs: Roofs | None, reason: str) -> list[dict]:
        rows = [entry_of(r) for r in case.lost(roofs or Roofs(1.0, 1.0, None), reason)]
        if roofs is None:  # no device, so no roof and no limit in seconds: bytes, FLOPs and exponentials stay
            rows = [{**row, "limit_seconds": None, "limit_by": None, "limit_rate": None} for row in rows]
        return rows


# --- progress -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Estimate:
    """Time left, from what the cases of this run took so far."""

    def __init__(self, total: int, done: Sequence[float] = ()) -> None:
        self.total, self.taken, self.left = total, list(done), total

    def add(self, seconds: float) -> None:
        self.taken.append(seconds)
        self.left -= 1

    def __str__(self) -> str:
        return f"about {duration(self.left * sum(self.taken) / len(self.taken))} left" if self.taken and self.left else ""


@contextlib.contextmanager
def progress(estimate: Estimate) -> Iterator[Callable[[str, str], None]]:
    """say(case, "") when a case begins, say(case, what became of it) when it ends: a bar on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                BarColumn(30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[eta]}"),
                TextColumn("{task.description}"),
            )
            from rich.console import Console

            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task("", total=estimate.total, eta=str(estimate))

                def say(case: str, ended: str) -> None:
                    if ended:
                        bar.console.print(f"{case}: {ended}", highlight=False, markup=False)
                    bar.update(task, completed=estimate.total - estimate.left, description=case if not ended else "", eta=str(estimate))

                yield say
            return

    def say(case: str, ended: str) -> None:
        if ended:
            left = f"; {estimate}" if str(estimate) else ""
            print(f"[{estimate.total - estimate.left}/{estimate.total}] {case}: {ended}{left}", file=sys.stderr, flush=True)

    yield say


# --- the run ------------------------------------------------------------------------------------------------------------


def planned(module: ModuleType, args: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """(all cases of the preset, those asked for), in an order drawn from the seed: a machine that warms up or a neighbour
    that comes and goes must not meet the cases of one scenario only."""
    every = list(module.cases(args.preset, args.device))
    names = list(dict.fromkeys(case.scenario for case in every))
    if not every:
        raise RunError(f"--scenarios: {args.scenarios} has no case for preset {args.preset} on {args.device}")
    unknown = sorted(set(args.scenario or ()) - set(names))
    if unknown:
        raise RunError(f"--scenario has {', '.join(unknown)}, expected some of {', '.join(names)} (of preset {args.preset})")
    random.Random(args.seed).shuffle(every)
    return every, [case for case in every if not args.scenario or case.scenario in args.scenario]


def outcome(entry: dict) -> str:
    """A few words on the line of a case that has ended."""
    if entry["status"] != "done":
        return f"{entry['status'].upper()} ({entry['reason']})"
    ran = [r for r in entry["results"] if r["record"]]
    rest = len(entry["results"]) - len(ran)
    return ", ".join(f"{r['entry']} {seconds_text(r['record']['median'])}" for r in ran[:3]) + (" ..." if len(ran) > 3 else "") + (
        f"{', ' if ran else ''}{rest} not run" if rest else ""
    )  # fmt: skip


def measure(args: argparse.Namespace, folder: Path, every: list[Case], wanted: list[Case], about: dict[str, str]) -> dict:
    """Runs what is missing of `wanted`; returns the results of all that the journal holds. Raises JournalError, RunError."""
    before, _, _ = read_journal(folder / "journal.jsonl")
    last = {e["id"]: e for e in before if e["kind"] == "case"}
    pending = [c for c in wanted if c.id not in last or (args.retry and last[c.id]["status"] in FAILED)]
    if not pending:
        print(f"{folder.name}: all {len(wanted)} cases are done; --run NAME starts another run", file=sys.stderr)
        return results.collect(folder.name, before)
    settings = {
        "preset": args.preset, "scenarios": args.scenarios, "seconds": args.seconds, "seed": args.seed, "asked_device": args.device,
        "asked_threads": args.threads, "cases": len(every),
    }  # fmt: skip
    there = torch.device(args.device).type == "cpu" or torch.cuda.is_available()
    with Journal(folder / "journal.jsonl", identity(args.device, settings), stamp(args.device if there else "cpu"), about) as journal:
        done = f", {len(wanted) - len(pending)} done before" if len(pending) < len(wanted) else ""
        print(f"{folder.name}: {len(pending)} cases{done}; Ctrl-C stops, the same command goes on", file=sys.stderr)
        runner = Runner(args, folder, journal)
        estimate = Estimate(len(pending), [e["seconds"] for e in last.values() if e["status"] == "done"])
        with progress(estimate) as say:
            say("the machine's roofs", "")
            roofs = runner.roofs()
            begun = journal.entries[0]["identity"]["source"]
            for case in pending:
                if (now := source()) != begun:  # each case imports what lies there now
                    raise RunError(f"the source is {now}, expected {begun}, with which {folder.name} was begun; what is measured is kept")
                say(case.id, "")
                entry = runner.case(case, roofs)
                journal.append(entry)
                estimate.add(entry["seconds"])
                say(case.id, outcome(entry))
        return results.collect(folder.name, journal.entries)


def adopt(run: dict, folder: Path, recorded: Path) -> int:
    """Appends the run's records to `recorded`/<device>/<scenario>.jsonl, once; returns how many."""
    mark = folder / "recorded"
    if mark.exists():
        raise RunError(f"--record: {folder.name} was recorded before; the records are append-only")
    count, i = 0, run["identity"]
    device = slug(i["device"], i["cores"] if i["asked_device"] == "cpu" else None)
    for case in run["cases"]:
        environment = {**run["environment"], "date": case["date"], "run": run["run"]}
        rows = [r for r in case["results"] if r["record"]]
        found = [Record(**r["record"], note="; ".join(r["notes"]), environment=environment) for r in rows]
        if found:
            store.append(found, recorded / device / f"{case['scenario']}.jsonl")
            count += len(found)
    mark.write_text(f"{count}\n")
    return count


def summary(run: dict) -> None:
    """The results on one screen."""
    rows = []
    for case in run["cases"]:
        against = {r["entry"]: r for r in case["ratios"]}
        for i, r in enumerate(case["results"]):
            ratio = against.get(r["entry"])
            rows.append(
                [
                    "" if i else case["id"], r["entry"], seconds_text(r["record"]["median"]) if r["record"] else "not run",
                    report.rate_text(r["rate"], r["unit"]), "-" if r["fraction"] is None else f"{r['fraction']:.0%}",
                    "-" if ratio is None else report.ratio_text(ratio["ratio"], ratio["low"], ratio["high"]),
                    ("*" if r["notes"] or case["notes"] else "") if r["record"] else r["reason"][:100],
                ]
            )  # fmt: skip
    e = run["environment"]
    print_table(
        f"{run['run']}: {run['identity']['device']}, {e['threads']} threads, torch {e['torch']}, source {run['identity']['source']}",
        [("case", "<"), ("model", "<"), ("median", ">"), ("rate", ">"), ("of limit", ">"), ("time a unit / first", ">"), ("", "<")], rows,
    )  # fmt: skip
    marked = [case for case in run["cases"] if case["status"] in FAILED]
    for case in marked:
        print(f"{case['status'].upper()}: {case['id']}: {case['reason']}")
    done = f"{len(run['cases'])} of {run['planned']} cases"
    print(f"{done}, {len(marked)} of them marked" if marked else done)


def side_by_side(new: dict, old: dict) -> list[compare.Pair]:
    found = compare.pairs(new, old)
    rows = []
    for p in found:
        interval = f"{p.ratio.low:.3f} .. {p.ratio.high:.3f}" if p.known else "-"
        rows.append([p.case, p.entry, seconds_text(p.old), seconds_text(p.new), f"{p.ratio.median:.3f}", interval, p.verdict])
    numbers = ((old["run"], ">"), (new["run"], ">"), ("ratio", ">"), ("99% interval", ">"))
    print_table(f"{new['run']} against {old['run']}", [("case", "<"), ("model", "<"), *numbers, (f"{new['run']} is", "<")], rows)
    for line in compare.caution(new, old):
        print(f"caution: {line}")
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="cobra bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--preset", choices=PRESETS, help="sizes: laptop (scaled-down twins), gpu (real sizes), paper (default: what fits the device)"
    )
    p.add_argument("--scenario", action="append", metavar="NAME", help="only this scenario (repeatable; --list names them)")
    p.add_argument("--compare", metavar="RUN", help="an earlier run, by name or folder, to set beside this one")
    p.add_argument("--run", metavar="NAME", help="name of the run, its folder under --out (default: preset, device, commit)")
    p.add_argument("--device", help="cpu or cuda (default: cuda where there is one, but cpu for the preset laptop)")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="folder of the runs (default: out/bench)")
    p.add_argument("--limit", type=float, metavar="SECONDS", help="of one case, then it is marked (default: 600, or what its models may take)")
    p.add_argument("--retry", action="store_true", help="measure cases again that crashed, ran out of memory or time")
    p.add_argument("--seconds", type=float, help="measuring time of one model in one case (default: the case's)")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    p.add_argument("--seed", type=int, default=0, help="order of cases and rounds (default: %(default)s)")
    p.add_argument("--record", action="store_true", help="append what was measured to benchmarks/results/<device>/")
    p.add_argument("--scenarios", default="benchmarks.scenarios", metavar="MODULE", help="where the cases come from (default: %(default)s)")
    p.add_argument("--list", action="store_true", help="list the cases and leave")
    return p


def settle(args: argparse.Namespace) -> None:
    """Fills in what was not said. Raises RunError."""
    gpu = torch.cuda.is_available()
    args.preset = args.preset or ("gpu" if gpu and args.device != "cpu" else "laptop")
    args.device = args.device or ("cuda" if args.preset == "gpu" or (args.preset == "paper" and gpu) else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise RunError(f"--device has {args.device!r}, expected cpu, cuda or cuda:<index>")
    for name in ("limit", "seconds"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise RunError(f"--{name} has {value:g}, expected more than 0 seconds")
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.run or f"{args.preset}-{args.device.replace(':', '')}-{source()}"
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise RunError(f"--run has {name!r}, expected letters, digits and ._+- (the name of a folder)")
    args.run = name


def run_named(name: str, out: Path) -> dict:
    """The earlier run of --compare: a name under `out`, or a folder."""
    folder = next((f for f in (out / name, Path(name)) if (f / "journal.jsonl").exists()), None)
    if folder is None:
        have = ", ".join(sorted(f.parent.name for f in out.glob("*/journal.jsonl"))) or "none"
        raise RunError(f"--compare has {name!r}, expected a run or its folder; runs in {os.path.relpath(out)}: {have}")
    return results.load(folder)


def bench(args: argparse.Namespace) -> int:
    settle(args)
    try:
        module = importlib.import_module(args.scenarios)
    except ModuleNotFoundError as error:
        raise RunError(f"--scenarios has {args.scenarios!r}, expected a module that can be imported: {error}") from None
    every, wanted = planned(module, args)
    if args.list:
        for case in sorted(wanted, key=lambda c: c.scenario):
            print(f"{case.id}: {'; '.join(e.name for e in case.entries)}")
        return 0
    other = run_named(args.compare, args.out) if args.compare else None  # a wrong name is told before an hour is spent
    folder = args.out / args.run
    stopped = False
    try:
        run = measure(args, folder, every, wanted, module.SCENARIOS)
    except KeyboardInterrupt:
        stopped = True
        run = results.load(folder)
    summary(run)
    pairs = side_by_side(run, other) if other else []
    print("written:")
    for path in report.write(run, folder, other, pairs):
        print(f"  {os.path.relpath(path)}")
    if args.record and not stopped:
        print(f"recorded: {adopt(run, folder, store.RESULTS)} records under {os.path.relpath(store.RESULTS)}/")
    if stopped:
        print(f"cobra bench: stopped after {len(run['cases'])} of {run['planned']} cases; the same command goes on", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return bench(args)
    except (JournalError, RunError) as error:
        print(f"cobra: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
