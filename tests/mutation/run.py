"""`make mutate`: puts the faults of faults.py into the sources, one at a time, and sees whether the suite notices.

    python tests/mutation/run.py [--only PATTERN] [--room ROOM] [--list] [--jobs N] [--keep] [--record]

Nothing is changed in the working tree. It is copied to build/mutation/base and built there once, without optimization that only
costs compile time; every worker has a copy of that. A fault is a text substitution in a worker's copy: the objects that depend on
the file are compiled (those of the room on trial, a CPU kernel at one instruction-set level) and linked in front of the others of
the base; then the killer runs, the test that is there for such a fault. A killer must pass on the sources as they are.

A run that was stopped goes on where it was while neither sources nor tests change; with --keep also after that. Exit status 1 when
fewer than 95% are killed, when a fault no longer matches its source or does not compile, or when a killer fails without a fault.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutation.faults import FAULTS, Fault, Killer  # noqa: E402

REQUIRED = 0.95
SHORTEST_LIMIT = 60.0  # seconds; a killer may take five times what it takes without a fault, and as long as this
PAGE = "docs/mutation.md"
HEADING = "## What was tried\n"
TARGETS = ("ext", "host-emulated", "host-cpu", "host")  # builds of csrc/build.py whose objects a fault can be in
KILLED = ("killed", "hang", "crash")


class Invalid(Exception):
    """A fault that says nothing: its text is not in the source, or what it makes of it does not compile."""


class Outcome(NamedTuple):
    """What came of one fault: killed, hang and crash are kills; survived; invalid is an error of the table."""

    id: str
    outcome: str
    by: str  # the test that failed, or why the fault is invalid
    seconds: float
    commit: str  # what the tree was, or was changed from


# --- the copy --------------------------------------------------------------------------------------------------------


def tree_files(root: Path) -> list[str]:
    """Every file that git would add; every file at all where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return sorted({name for name in listed.stdout.split("\0") if name and (root / name).is_file()})
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def patched(name: str, text: bytes, base: bool) -> bytes:
    """A file as it is in the copy. Only the build script differs: -O1 compiles kernels several times faster, and a worker's tests
    build nothing."""
    if name != "csrc/build.py":
        return text
    text = text.replace(b'CXX_FLAGS = ["-O3"', b'CXX_FLAGS = ["-O1"')
    text = text.replace(b'"-O1", "-Wno-unknown-pragmas"', b'"-O0", "-Wno-unknown-pragmas"')
    return text if base else text + b"\n\ndef build_host(target: str) -> None:\n    pass  # tests/mutation/run.py has built it\n"


def sync(root: Path, names: list[str], copy: Path, base: bool) -> None:
    """Makes `copy` hold exactly these files. One that is the same is not written, so that ninja sees what changed."""
    for name in names:
        text, target = patched(name, (root / name).read_bytes(), base), copy / name
        if not target.is_file() or target.read_bytes() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
    wanted = set(names)
    for path in [path for path in copy.rglob("*") if path.is_file()]:
        name = str(path.relative_to(copy))
        if name not in wanted and not name.startswith("build/") and path.suffix != ".so":
            path.unlink()


def digest(root: Path, names: list[str]) -> str:
    """Of everything that decides about an outcome, but the table of faults."""
    total = hashlib.sha256()
    for name in names:
        if not name.startswith(("tests/mutation/", "benchmarks/", "docs/", "assets/", "Makefile")) and not name.endswith(".md"):
            total.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    return total.hexdigest()[:16]


def commit_of(root: Path) -> str:
    """Short name of HEAD, with + where files differ from it; nothing without git."""
    git = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(git, cwd=root, capture_output=True, text=True, check=False).stdout.strip()


# --- the build -------------------------------------------------------------------------------------------------------


class Build:
    """The base's compile commands, and who depends on which file."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.commands: dict[str, list[str]] = {}  # output -> command
        self.dependents: dict[str, set[str]] = collections.defaultdict(set)  # file -> objects
        for target in TARGETS:
            folder = base / "build" / target
            if not (folder / "compile_commands.json").exists():
                continue
            for entry in json.loads((folder / "compile_commands.json").read_text()):
                self.commands[entry["output"]] = shlex.split(entry["command"])
            ninja = ["ninja", "-f", str(folder / "build.ninja"), "-t", "deps"]
            for line in subprocess.run(ninja, capture_output=True, text=True, check=True).stdout.splitlines():
                if line and not line.startswith(" "):
                    output = line.split(": #deps")[0]
                elif line:
                    self.dependents[line.strip()].add(output)

    def module(self, killer: Killer) -> Path:
        """The shared object that a killer loads."""
        if killer.path.startswith("tests/simt"):
            return next(self.base.glob("build/host/cobra_kernels_host*.so"))
        return self.base / "cobra_kernels" / "_C.abi3.so"

    def objects(self, fault: Fault) -> list[str]:
        """What to compile: objects of the killer's module and the room that depend on the file, CPU kernels at the fault's level."""
        parts = set(self.commands[str(self.module(fault.killer))])
        found = []
        for output in sorted(self.dependents[str(self.base / fault.file)] & parts):
            name = Path(output).name
            level = re.search(r"_cpu\.cpp\.(\w+)\.o$", name)
            if Path(output).parent.name in (fault.room, "common") and (level is None or level[1] == fault.level):
                found.append(output)
        if not found:
            raise Invalid(f"no object of {fault.room} at level {fault.level} depends on {fault.file}")
        return found

    def link(self, fault: Fault, worker: Path) -> None:
        """The module with the fault into the worker. Its objects come first: of an inline function the linker keeps the first copy."""
        module = self.module(fault.killer)
        faulty = {}
        for number, output in enumerate(self.objects(fault)):
            faulty[output] = str(worker / "build" / f"faulty{number}.o")
            command = [word.replace(str(self.base), str(worker)) for word in self.commands[output]]
            command = command[: command.index("-MD")] + ["-w", "-c", command[command.index("-c") + 1], "-o", faulty[output]]
            run_compiler(command)
        link = [word for word in self.commands[str(module)] if word not in faulty]
        out = link.index("-o")
        target = worker / module.relative_to(self.base)
        target.unlink(missing_ok=True)
        run_compiler([*link[:out], "-o", str(target), *faulty.values(), *link[out + 2 :]])


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
        raise Invalid(f"does not compile: {errors[0]}")


# --- one fault -------------------------------------------------------------------------------------------------------


def faulty_text(text: str, fault: Fault) -> str:
    """`text` with the fault in it."""
    count = text.count(fault.old)
    if count != 1:
        raise Invalid(f"stale: {fault.file} has its text {count} times; update the fault to the source")
    changed = text.replace(fault.old, fault.new)
    if changed == text:
        raise Invalid("changes nothing")
    if fault.file.endswith(".py"):
        try:
            compile(changed, fault.file, "exec")
        except SyntaxError as error:
            raise Invalid(f"does not compile: {error}") from error
    return changed


def run_killer(killer: Killer, worker: Path, limit: float, in_python: bool = False) -> tuple[str, str]:
    """(passed, killed, hang, crash or broken; the first test that failed, or what pytest said)."""
    environment = os.environ | {"PYTHONPATH": str(worker), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if in_python:  # the fault must not stay in a cache of compiled modules
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "--tb=line", "-p", "no:cacheprovider", killer.path]
    command += ["-k", killer.expression] if killer.expression else []
    if killer.path.startswith("tests/simt/"):
        command += ["--confcutdir", "tests/simt"]  # without tests/conftest.py, which imports torch: half of such a test's time
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    child = subprocess.Popen(command, cwd=worker, env=environment, start_new_session=True, **streams)
    try:
        output, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the session of this child alone
        child.communicate()
        return "hang", f"nothing within {limit:.0f} s"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    named = failed[1].split("::", 1)[-1] if failed else ""
    if child.returncode < 0:
        return "crash", signal.Signals(-child.returncode).name
    if child.returncode == 1 or child.returncode == 2 and "error" in output:
        return "killed", named or "at collection"
    if child.returncode == 0 and re.search(r"\b[1-9]\d* passed", output):
        return "passed", ""
    return "broken", " ".join(output.split())[-300:] or f"exit status {child.returncode}"


def try_fault(fault: Fault, worker: Path, build: Build | None, limit: float) -> tuple[str, str]:
    """Puts the fault in, builds, runs the killer, takes the fault out: (outcome, by)."""
    source, module = worker / fault.file, None
    text = source.read_text()
    try:
        source.write_text(faulty_text(text, fault))
        if fault.file.startswith("csrc/"):
            module = build.module(fault.killer).relative_to(build.base)
            build.link(fault, worker)
        outcome, by = run_killer(fault.killer, worker, limit, fault.file.endswith(".py"))
        outcome = {"passed": "survived", "broken": "invalid"}.get(outcome, outcome)
    except Invalid as error:
        outcome, by = "invalid", str(error)
    finally:
        source.write_text(text)
        if module:
            shutil.copy2(build.base / module, worker / module)
    return outcome, by


# --- a run -----------------------------------------------------------------------------------------------------------


class Run:
    """Faults on `jobs` workers in `folder`; outcomes are kept in results.jsonl, for the tree that they were found on."""

    def __init__(self, root: Path, faults: list[Fault], jobs: int, folder: Path | None = None, keep: bool = False) -> None:
        self.root, self.faults, self.jobs, self.keep = root, faults, jobs, keep
        self.folder = folder or root / "build" / "mutation"
        self.base = self.folder / "base"
        self.names = [name for name in tree_files(root) if not name.startswith("benchmarks/results/")]
        self.tree, self.commit = digest(root, self.names), commit_of(root)
        self.lock = threading.Lock()
        self.log = self.folder / "results.jsonl"
        self.build: Build | None = None

    def known(self, keep: bool = False) -> dict[str, dict]:
        """What earlier runs wrote, by key: about this tree, or, to keep, about any."""
        if not self.log.exists():
            return {}
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
        return {line["key"]: line for line in lines if keep or line["tree"] == self.tree}

    def found(self, keep: bool = False) -> dict[str, Outcome]:
        """Outcomes of earlier runs by id, in the order of the table."""
        known = self.known(keep)
        return {fault.id: Outcome(**known[key_of(fault)]["outcome"]) for fault in self.faults if key_of(fault) in known}

    def write(self, key: str, **values) -> None:
        with self.lock, self.log.open("a") as log:
            log.write(json.dumps({"tree": self.tree, "key": key, **values}) + "\n")

    def prepare(self, faults: list[Fault]) -> list[Path]:
        """Copies the tree, builds it where a fault needs that, and copies it for the workers."""
        self.base.mkdir(parents=True, exist_ok=True)
        sync(self.root, self.names, self.base, True)
        if any(fault.file.startswith("csrc/") for fault in faults):
            print(f"building {self.base.relative_to(self.root)} (CPU kernels, emulated CUDA kernels, bindings)", flush=True)
            environment = os.environ | {"COBRA_KERNELS_BUILD_CUDA": "0", "MAX_JOBS": str(self.jobs)}
            command = [sys.executable, "csrc/build.py", "ext", "host"]
            done = subprocess.run(command, cwd=self.base, env=environment, text=True, capture_output=True, check=False)
            if done.returncode:
                raise SystemExit(f"the sources do not build without a fault:\n{(done.stdout + done.stderr)[-3000:]}")
            self.build = Build(self.base)
        workers = [self.folder / f"worker{i}" for i in range(self.jobs)]
        for worker in workers:
            sync(self.root, self.names, worker, False)
            (worker / "build").mkdir(exist_ok=True)
            for module in (*self.base.glob("cobra_kernels/*.so"), *self.base.glob("build/host/*.so")):
                target = worker / module.relative_to(self.base)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(module, target)
        return workers

    def spread(self, items: list, work, workers: list[Path]) -> None:
        """work(item, worker) for every item, each worker one at a time; the first exception ends all and is raised."""
        queue, errors = collections.deque(items), []

        def serve(worker: Path) -> None:
            while not errors:
                with self.lock:
                    if not queue:
                        return
                    item = queue.popleft()
                try:
                    work(item, worker)
                except BaseException as error:
                    errors.append(error)

        threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def control(self, faults: list[Fault], workers: list[Path]) -> dict[Killer, float]:
        """Every killer without a fault: its seconds. One that does not pass ends the run."""
        seconds, broken, known = {}, [], self.known()
        killers = list(dict.fromkeys(fault.killer for fault in faults))
        print(f"{len(killers)} killers without a fault, then {len(faults)} faults", flush=True)

        def work(killer: Killer, worker: Path) -> None:
            key = f"control {killer}"
            if key in known:
                seconds[killer] = known[key]["seconds"]
                return
            start = time.monotonic()
            outcome, by = run_killer(killer, worker, 600)
            seconds[killer] = time.monotonic() - start
            if outcome == "passed":
                self.write(key, seconds=seconds[killer])
            else:
                broken.append(f"{killer}: {outcome} {by}")

        self.spread(killers, work, workers)
        if broken:
            raise SystemExit("these fail without a fault, so they say nothing about one:\n  " + "\n  ".join(broken))
        return seconds

    def __call__(self) -> list[Outcome]:
        """Outcomes in the order of the table."""
        outcomes = self.found(self.keep)
        todo = by_turns([fault for fault in self.faults if fault.id not in outcomes])
        if outcomes:
            print(f"{len(outcomes)} faults are known from an earlier run", flush=True)
        if not todo:
            return [outcomes[fault.id] for fault in self.faults]
        workers = self.prepare(todo)
        seconds = self.control(todo, workers)
        done, start = 0, time.monotonic()

        def work(fault: Fault, worker: Path) -> None:
            nonlocal done
            begin = time.monotonic()
            said = try_fault(fault, worker, self.build, max(SHORTEST_LIMIT, 5 * seconds[fault.killer]))
            outcome = Outcome(fault.id, *said, time.monotonic() - begin, self.commit)
            if outcome.outcome != "invalid":
                self.write(key_of(fault), outcome=outcome._asdict())
            with self.lock:
                outcomes[fault.id] = outcome
                done += 1
                left = (time.monotonic() - start) / done * (len(todo) - done) / 60
                place = f"[{len(outcomes):3}/{len(self.faults)}, {left:2.0f} min left]"
                print(f"{place} {outcome.outcome:8} {outcome.seconds:5.1f} s  {fault.id}  <- {outcome.by[:90]}", flush=True)

        self.spread(todo, work, workers)
        return [outcomes[fault.id] for fault in self.faults]


# --- what it says ----------------------------------------------------------------------------------------------------


def by_turns(faults: list[Fault]) -> list[Fault]:
    """One fault of each room, then the next of each: a run that is stopped has seen something of all."""
    place, count = {}, collections.Counter()
    for fault in faults:
        place[fault.id] = count[fault.room]
        count[fault.room] += 1
    return sorted(faults, key=lambda fault: place[fault.id])


def key_of(fault: Fault) -> str:
    """What a result is kept by: a fault that says or does anything else has to be tried again."""
    return str(tuple(fault._replace(note="")))


def kill_rate(outcomes: list[Outcome]) -> float:
    return sum(outcome.outcome in KILLED for outcome in outcomes) / max(len(outcomes), 1)


def summary(outcomes: list[Outcome], faults: list[Fault]) -> str:
    """The count, then survivors with what would catch them, then what is wrong with the table."""
    by_id = {fault.id: fault for fault in faults}
    count = collections.Counter(outcome.outcome for outcome in outcomes)
    counted = ", ".join(f"{n} {what}" for what, n in count.most_common())
    lines = [f"{len(outcomes)} faults, {kill_rate(outcomes):.1%} killed: {counted}"]
    for outcome in outcomes:
        if outcome.outcome == "survived":
            lines.append(f"survived: {outcome.id}: {by_id[outcome.id].note or 'nobody has said yet what would catch it'}")
    lines += [f"invalid: {outcome.id}: {outcome.by}" for outcome in outcomes if outcome.outcome == "invalid"]
    return "\n".join(lines)


def record(root: Path, outcomes: list[Outcome], faults: list[Fault]) -> None:
    """Writes the last part of docs/mutation.md: the newest outcome of every fault that was tried."""
    by_id = {fault.id: fault for fault in faults}
    tried = f"all {len(faults)} faults" if len(outcomes) == len(faults) else f"{len(outcomes)} of {len(faults)} faults"
    lines = [f"{time.strftime('%Y-%m-%d')}: {tried} tried, {kill_rate(outcomes):.1%} killed.", ""]
    lines += ["| fault | file | outcome | seen by, or what would see it | at commit |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        fault = by_id[outcome.id]
        by = f"`{outcome.by.split('[')[0]}`" if outcome.outcome == "killed" else outcome.by if outcome.outcome in KILLED else fault.note
        lines.append(f"| {fault.id} | `{fault.file}` | {outcome.outcome} | {by} | {outcome.commit} |")
    page = root / PAGE
    before = page.read_text().split(HEADING)[0]
    page.write_text(before + HEADING + "\n" + "\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when enough faults are killed and all of them are valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="faults whose id matches this regular expression")
    parser.add_argument("--room", help="faults of this room")
    parser.add_argument("--list", action="store_true", help="say what there is and what is known of it, run nothing")
    jobs = int(os.environ.get("MAX_JOBS", "2"))
    parser.add_argument("--jobs", type=int, default=jobs, help="workers, a core each (default: MAX_JOBS, else 2)")
    parser.add_argument("--keep", action="store_true", help="take what earlier runs found on other sources; the record says their commit")
    parser.add_argument("--record", action="store_true", help=f"write {PAGE}; with --list without a run")
    options = parser.parse_args(argv)
    faults = [f for f in FAULTS if (not options.only or re.search(options.only, f.id)) and options.room in (None, f.room)]
    if not faults:
        parser.error("no fault is chosen")
    if options.list:
        known = Run(ROOT, faults, 1).found(options.keep)
        for fault in faults:
            print(f"{known[fault.id].outcome if fault.id in known else '':8} {fault.id:75} {fault.file}  [{fault.killer}]")
        print(f"{len(faults)} faults, {len(known)} tried")
        if options.record:
            record(ROOT, list(Run(ROOT, FAULTS, 1).found(options.keep).values()), FAULTS)
        return 0
    start = time.monotonic()
    outcomes = Run(ROOT, faults, max(options.jobs, 1), keep=options.keep)()
    print(summary(outcomes, faults))
    print(f"{(time.monotonic() - start) / 60:.1f} min")
    if options.record:
        record(ROOT, list(Run(ROOT, FAULTS, 1).found(options.keep).values()), FAULTS)
    return 0 if kill_rate(outcomes) >= REQUIRED and all(outcome.outcome != "invalid" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
