"""The working tree against a commit: `python -m benchmarks --base REF [--only OP] [--quick]`.

1. The tests of every room compared run in the working tree. A red room is not compared: no speed-up on red tests.
2. Both trees are checked out as git worktrees under build/base/ and built there by ninja, for the CPU only. The working tree is taken as it is,
   uncommitted and new files included; neither its index nor a branch is touched.
3. Two processes, one per tree, run the same bench files (the working tree's) and take their blocks in turns, in a random order within each
   round. All of that is repeated with fresh processes, because where a process happens to lie in memory can cost a few percent.

A ratio is the median over all rounds; its interval spans the 99% intervals of every pair of processes, so that a difference is only
claimed when every pair shows it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.harness.environment import ROOT, stamp
from benchmarks.harness.table import print_table, seconds_text
from benchmarks.harness.timing import Ratio, Timing, compare, quantile

ROUNDS = range(8, 16)  # fewer than 8 carry no 99% interval
SECONDS = 0.4  # of one side and case, in one pair of processes; slow calls take more
SHARED = ("csrc/common/", "csrc/build.py", "setup.py")  # and the modules at the top of cobra_kernels/
MODELS = {"lm": ("modules",), "train": ("modules",), "ttft": ("modules", "model")}  # bench -> folders of tests


class Refused(RuntimeError):
    """There is nothing to compare, or no honest way to."""


# --- trees ----------------------------------------------------------------------------------------------------------------


def git(root: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise Refused(f"git {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def snapshot(root: Path) -> str:
    """A commit of the working tree as it is, made through an index of its own. HEAD when nothing differs from it."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        shutil.copy(root / git(root, "rev-parse", "--git-path", "index"), index)
        git(root, "add", "-A", GIT_INDEX_FILE=str(index))
        tree = git(root, "write-tree", GIT_INDEX_FILE=str(index))
    if tree == git(root, "rev-parse", "HEAD^{tree}"):
        return git(root, "rev-parse", "HEAD")
    who = {f"GIT_{role}_{what}": "bench" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    when = {f"GIT_{role}_DATE": git(root, "show", "-s", "--format=%cI", "HEAD") for role in ("AUTHOR", "COMMITTER")}  # one tree, one commit
    return git(root, "commit-tree", tree, "-p", "HEAD", "-m", "the working tree", **who, **when)


def check_out(root: Path, commit: str, folder: Path) -> None:
    """A worktree of the commit. One that is there already changes only the files that differ, so that ninja builds only what they touch."""
    if (folder / ".git").exists():
        git(folder, "checkout", "--quiet", "--force", "--detach", commit)
        git(folder, "clean", "-fdq")  # ignored files, objects among them, stay
    else:
        git(root, "worktree", "prune")
        git(root, "worktree", "add", "--quiet", "--force", "--detach", str(folder), commit)


def build(folder: Path, **environment: str) -> None:
    """The extension of a tree, in place."""
    done = subprocess.run(
        [sys.executable, "csrc/build.py", "ext"], cwd=folder, env={**os.environ, **environment}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise Refused(f"{folder.name} does not build:\n" + "\n".join(done.stdout.splitlines()[-20:]))


def lay_out(place: Path, name: str) -> Path:
    """The folder a side runs in: its tree's packages beside the working tree's benches."""
    folder = place / f"run-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for package, tree in (("benchmarks", "head"), ("cobra_kernels", name), ("cobra", name)):
        link = folder / package
        link.unlink(missing_ok=True)
        link.symlink_to(place / tree / package)
    return folder


# --- what is compared -----------------------------------------------------------------------------------------------------


def touched(paths: Sequence[str], benches: Sequence[str]) -> list[str]:
    """The benches whose code a change of these paths reaches."""

    def reaches(bench: str, path: str) -> bool:
        if bench in MODELS:
            return path.startswith(tuple(f"{'cobra_kernels/modules' if f == 'modules' else 'cobra'}/" for f in MODELS[bench]))
        shared = path.startswith(SHARED) or path.startswith("cobra_kernels/") and path.endswith(".py") and path.count("/") == 1
        return shared or path.startswith((f"csrc/{bench}/", f"cobra_kernels/ops/{bench}/")) or bench == "overhead" and "/op.py" in path

    return [bench for bench in benches if any(reaches(bench, path) for path in paths)]


def tests_of(bench: str, root: Path) -> list[str]:
    """The test files of a bench's room: tests/*/test_<room>*.py, but not those of a room with a longer name."""
    if bench in MODELS:
        return [f"tests/{folder}" for folder in MODELS[bench]]
    if bench == "overhead":
        return ["tests/ops"]
    rooms = [p.name for p in (root / "cobra_kernels" / "ops").glob("*") if p.name.startswith(bench) and p.name != bench]
    files = [p for p in sorted(root.glob(f"tests/*/test_{bench}*.py")) if not any(room in p.stem for room in rooms)]
    return [str(p.relative_to(root)) for p in files]


def red(bench: str, root: Path) -> str | None:
    """The last lines of the room's tests when they are not green in the working tree, and None when they are."""
    files = tests_of(bench, root)
    if not files:
        return f"{bench} has no tests (tests/*/test_{bench}*.py)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", str(min(2, os.cpu_count() or 1)), "-m", "not threads", *files], cwd=root, text=True,
        check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return "\n".join(done.stdout.splitlines()[-15:]) if done.returncode else None


# --- measuring ------------------------------------------------------------------------------------------------------------


class Process:
    """A side (benchmarks/harness/side.py) at work in its folder."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.errors = tempfile.TemporaryFile("w+")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.side"], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.tree = tree

    def ask(self, **command) -> dict:
        try:
            print(json.dumps(command), file=self.child.stdin, flush=True)
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            raise Refused(f"the process of {self.tree.name} ended:\n" + "\n".join(self.errors.read().splitlines()[-15:]))
        return json.loads(line)

    def start(self, **what) -> dict:
        answer = self.ask(do="start", **what)
        if "package" in answer and not Path(answer["package"]).is_relative_to(self.tree.resolve()):
            raise Refused(f"{self.tree.name}: cobra_kernels was imported from {answer['package']}, not from its tree")
        return answer

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception) -> None:
        self.child.stdin.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.errors.close()


@dataclass
class Compared:
    """One case: seconds per call of each side, one list per pair of processes, a round's samples at the same index."""

    op: str
    title: str
    provider: str
    head: list[list[float]] = field(default_factory=list)
    base: list[list[float]] = field(default_factory=list)

    @property
    def ratio(self) -> Ratio:
        """time(working tree) / time(base)."""
        pairs = [compare(a_timing(h), a_timing(b)) for h, b in zip(self.head, self.base)]
        every = [h / b for hs, bs in zip(self.head, self.base) for h, b in zip(hs, bs)]
        return Ratio(quantile(every, 0.5), min((p.low for p in pairs), default=0.0), max((p.high for p in pairs), default=math.inf), len(every))

    def seconds(self, side: str) -> float:
        return quantile([s for samples in getattr(self, side) for s in samples], 0.5)


def a_timing(samples: list[float]) -> Timing:
    return Timing("", "perf_counter", "", 0.0, 1, samples, list(range(len(samples))), 1, 0)


def measure_bench(module: str, place: Path, launches: int, backend: str | None, quick: bool) -> tuple[list[Compared], list[str]]:
    """(cases, what was left out and why) of one bench."""
    order, cases, left_out = random.Random(0), {}, {}
    for _ in range(launches):
        with Process(place / "run-head", place / "head") as head, Process(place / "run-base", place / "base") as base:
            answers = [p.start(module=module, backend=backend, quick=quick) for p in (head, base)]
            for name, answer in zip(("the working tree", "the base"), answers):
                if "error" in answer:
                    return [], [f"{module}: {name}: {answer['error']}"]
            theirs = {tuple(case): i for i, case in enumerate(answers[1]["cases"])}
            for index, case in enumerate(map(tuple, answers[0]["cases"])):
                if case not in theirs:
                    left_out[case] = "the base does not have it"
                    continue
                ready = [head.ask(do="prepare", case=index), base.ask(do="prepare", case=theirs[case])]
                error = next((answer["error"] for answer in ready if "error" in answer), None)
                if error:
                    left_out[case] = error
                    continue
                rounds = min(max(int(SECONDS / max(a["estimate"] for a in ready)), ROUNDS[0]), ROUNDS[-1])
                samples: dict[Process, list[float]] = {head: [], base: []}
                for _ in range(rounds):
                    for process in order.sample([head, base], 2):
                        samples[process].append(process.ask(do="sample")["seconds"])
                compared = cases.setdefault(case, Compared(*case))
                compared.head.append(samples[head])
                compared.base.append(samples[base])
    return list(cases.values()), [f"{' '.join(case[:2])}: {why}" for case, why in left_out.items()]


COLUMNS = [
    ("op", "<"), ("case", "<"), ("provider", "<"), ("working tree", ">"), ("base", ">"), ("tree / base", ">"), ("99% interval", ">"), ("verdict", "<"),
]  # fmt: skip


def row(c: Compared) -> list[str]:
    r = c.ratio
    return [
        c.op, c.title, c.provider, seconds_text(c.seconds("head")), seconds_text(c.seconds("base")), f"{r.median:.3f}", f"{r.low:.3f} .. {r.high:.3f}",
        r.verdict,
    ]  # fmt: skip


def run(ref: str, only: Sequence[str], *, backend: str | None = None, quick: bool = False, launches: int = 3, root: Path = ROOT) -> int:
    """Compares and prints. Exit status 1 when something was red or could not be compared at all."""
    try:
        return _run(ref, only, backend, quick, launches, root)
    except Refused as why:
        print(f"--base {ref}: {why}")
        return 1


def _run(ref: str, only: Sequence[str], backend: str | None, quick: bool, launches: int, root: Path) -> int:
    modules = {f.stem.removeprefix("bench_"): f"benchmarks.{f.parent.name}.{f.stem}" for f in sorted(root.glob("benchmarks/*/bench_*.py"))}
    base, head = git(root, "rev-parse", "--verify", f"{ref}^{{commit}}"), snapshot(root)
    paths = git(root, "diff", "--name-only", base, head).splitlines()
    names = list(only) or touched(paths, list(modules))
    if not names:
        raise Refused(f"none of the {len(paths)} files that differ belongs to a room; --only says what to compare all the same")
    build(root)
    failed = {}
    for name in names:
        print(f"tests of {name} ...", end="", flush=True)
        failed[name] = red(name, root)
        print(" RED" if failed[name] else " green", flush=True)
    if snapshot(root) != head:
        raise Refused("the working tree changed while its tests ran")
    green = [name for name in names if not failed[name]]
    compared: list[Compared] = []
    left_out: list[str] = []
    if green:
        place = root / "build" / "base"
        for name, commit in (("head", head), ("base", base)):
            check_out(root, commit, place / name)
            print(f"building {'the working tree' if name == 'head' else ref} ({commit[:12]}) ...", flush=True)
            build(place / name, COBRA_KERNELS_BUILD_CUDA="0")
            lay_out(place, name)
        for name in green:
            print(f"{name} ...", flush=True)
            cases, reasons = measure_bench(modules[name], place, launches, backend, quick)
            compared, left_out = compared + cases, left_out + reasons
    if compared:
        e = stamp()
        print_table(f"the working tree against {ref} ({base[:12]}), {e['device']}, {e['threads']} threads, load {e['load_average'][0]}", COLUMNS, [*map(row, compared)])
        file = root / "out" / "bench" / "base.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            for c in compared:
                fields = {"base": base, "head": head, "case": asdict(c), "ratio": asdict(c.ratio), "verdict": c.ratio.verdict, "environment": e}
                lines.write(json.dumps(fields) + "\n")
        print(f"a ratio below 1 is faster; samples: {file.relative_to(root)}")
    for line in left_out:
        print(f"left out: {line}")
    for name, lines in failed.items():
        if lines:
            print(f"\n{name} was not compared, its tests are red:\n{lines}")
    return 1 if any(failed.values()) or not compared else 0
