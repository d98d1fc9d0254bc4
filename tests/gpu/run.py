"""What the `make gpu-*` verbs run on a machine with a CUDA device. Needs its Python to hold torch, pytest and ninja; installs nothing.

    python -m tests.gpu.run test       build for the GPU present, doctor, streams and graphs, the suite, selftest
    python -m tests.gpu.run sanitize   memcheck, racecheck, initcheck, synccheck on boundary cases
    python -m tests.gpu.run bench      roofs, open questions, every bench with its peers
    python -m tests.gpu.run profile KERNEL   hardware counters of one kernel

Each verb stands alone. Under OUT it writes `gpu-<verb>.txt`, the whole output as it comes, and `gpu-<verb>.jsonl`: the
environment, then a line per finished step; a killed run keeps every line it wrote. `--rehearse` runs the same steps on the cpu
backend, small, where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
MINUTES = {"test": 6, "bench": 8, "sanitize": 8, "profile": 8}  # promised on 16 cores; a run is ended a little after
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What needs the device for itself, in the order of the file: streams first.
ALONE = "kernel or stream or waits or device or graph or compiled or 2_31"


def workers() -> int:
    return max(1, min((os.cpu_count() or 2) - 2, 12))


def architecture() -> str:
    """TORCH_CUDA_ARCH_LIST of the GPU present, as torch sees it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"


class Session:
    """The steps of one verb: output to the terminal and to one file, a record of each, and a deadline for all."""

    def __init__(self, verb: str, out: Path, rehearse: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.rehearse, self.failed, self.start = rehearse, [], time.monotonic()
        self.deadline = self.start + 60 * MINUTES[verb] * 1.15
        self.text = (out / f"gpu-{verb}.txt").open("w", buffering=1)
        self.records = (out / f"gpu-{verb}.jsonl").open("w", buffering=1)
        self.lock = threading.Lock()
        self.environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MAX_JOBS": str(os.cpu_count() or 2),
        }  # fmt: skip
        if rehearse:
            self.environment["COBRA_KERNELS_BUILD_CUDA"] = "0"
        else:
            self.environment.setdefault("TORCH_CUDA_ARCH_LIST", architecture())
        from benchmarks.harness.environment import stamp

        self.record({"verb": verb, "environment": stamp("cpu" if rehearse else "cuda")})

    def say(self, line: str) -> None:
        with self.lock:
            print(line, flush=True)
            self.text.write(line + "\n")

    def record(self, values: dict) -> None:
        with self.lock:
            self.records.write(json.dumps(values) + "\n")

    def finish(self, name: str, status: int, seconds: float, summary: str) -> bool:
        self.record({"step": name, "exit": status, "seconds": round(seconds, 1), "summary": summary})
        self.say(f"-- {name}: {'ok' if status == 0 else f'FAILED ({status})'}, {seconds:.0f} s  {summary}")
        if status:
            self.failed.append(name)
        return status == 0

    def step(self, name: str, command: list[str], environment: dict[str, str] | None = None, quiet: bool = False) -> tuple[int, str]:
        """Runs a command until the session's deadline; its output goes along line by line. Returns (exit status, output)."""
        if not quiet:
            self.say(f"-- {name}: {' '.join(command)}")
        start, lines = time.monotonic(), []
        process = subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **(environment or {})}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        timer = threading.Timer(max(1.0, self.deadline - start), lambda: os.killpg(process.pid, 9))
        timer.start()
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if not quiet:
                    self.say(lines[-1])
            status = process.wait()
        finally:
            timer.cancel()
        status = 124 if status == -9 and time.monotonic() >= self.deadline else status
        self.finish(name, status, time.monotonic() - start, next((line for line in reversed(lines) if line.strip()), ""))
        return status, "\n".join(lines)

    def end(self) -> int:
        seconds = time.monotonic() - self.start
        verdict = f"FAILED: {', '.join(self.failed)}" if self.failed else "all green"
        self.finish("all", len(self.failed), seconds, verdict)
        return 1 if self.failed else 0


def pytest(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", *arguments]


def build(session: Session) -> bool:
    return session.step("build", [PYTHON, "csrc/build.py", "ext"])[0] == 0


# --- Triton, compiled in advance ---------------------------------------------------------------------------------------


def _compile(share: tuple[str, int, int, int]) -> tuple[int, list[str]]:
    """In a worker: runs a share of the Triton calls of the tests once, so that their variants lie in Triton's cache."""
    from tests.gpu import cases
    from tests.gpu.carry import moved
    from tests.gpu.test_on_gpu import SAMPLED, SAMPLED_GRADIENTS
    from tests.sampler import has_gradients

    backend, index, count, limit = share
    device = "cpu" if backend == "cpu" else "cuda"
    from cobra_kernels import selfcheck

    done, errors = 0, []
    calls = [case for _, case in cases.sampled(limit or SAMPLED[backend], index, count)]
    trained = (case for _, case in cases.sampled(limit or SAMPLED_GRADIENTS[backend], index, count))
    calls += [case._replace(gradients=True) for case in trained if has_gradients(case)]
    for position, op in enumerate(cases.CALLS):
        if position % count == index:
            calls += [cases.make(op, batch, device == "cuda") for batch in (1, 2, 4)]
    for case in calls:
        try:
            selfcheck.run(cases.placed(case, lambda t: moved(t, device)), backend)
            done += 1
        except Exception as error:  # the tests will say it again, with the case
            errors.append(f"{case.op}: {type(error).__name__}: {error}"[:200])
    return done, errors


def compile_triton(session: Session, limit: int = 0) -> None:
    """Process pool: Triton compiles on one core per process and keeps what it made on disk."""
    start, backend, count = time.monotonic(), "cpu" if session.rehearse else "triton", workers()
    done, errors = 0, []
    os.environ["PYTHONPATH"] = session.environment["PYTHONPATH"]
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_compile, (backend, i, count, limit)) for i in range(count)]):
            made, wrong = future.result()
            done, errors = done + made, errors + wrong
    for line in errors[:10]:
        session.say(f"   {line}")
    session.finish(f"compile {backend} calls", 0, time.monotonic() - start, f"{done} calls in {count} processes, {len(errors)} failed")


# --- verbs -------------------------------------------------------------------------------------------------------------


def test(session: Session) -> int:
    """Streams and graphs alone on the device; values of all cases, and the suite of tests/ops, on many processes."""
    if not build(session):
        return session.end()
    session.step("doctor", [PYTHON, "-m", "cobra_kernels.doctor"])
    compile_triton(session)
    there = "rehearsal" if session.rehearse else "cuda or triton"
    many = ["-n", str(workers()), "--dist", "worksteal"]
    session.step("streams, graphs, sizes", pytest("tests/gpu/test_on_gpu.py", "-k", f"({there}) and ({ALONE})"))
    session.step("values", pytest("tests/gpu/test_on_gpu.py", *many, "-k", f"({there}) and not ({ALONE})"))
    carried = {"COBRA_CARRY": "rehearsal" if session.rehearse else "cuda,triton"}
    session.step("suite", pytest("-p", "tests.gpu.carry", "tests/ops", *many, "-m", "not threads"), carried)
    for backend in ("cpu",) if session.rehearse else ("cuda", "triton"):
        code = f"import cobra_kernels; cobra_kernels.selftest({'cpu' if session.rehearse else 'cuda'!r}, backend={backend!r})"
        session.step(f"selftest {backend}", [PYTHON, "-c", code])
    return session.end()


def our_kernels() -> re.Pattern:
    """Names of this project's kernels in a sanitizer's report: namespace cobra, and every @triton.jit function."""
    sources = ROOT.glob("cobra_kernels/ops/*/triton_kernel.py")
    names = {name for path in sources for name in re.findall(r"@triton\.jit\ndef (\w+)", path.read_text())}
    return re.compile("|".join([r"cobra::", r"5cobra", *(rf"\b{re.escape(name)}\b" for name in sorted(names))]))


HEADS = re.compile(r"Invalid __|Uninitialized __|Misaligned|Race reported|hazard detected|Barrier error|Program hit|Error:")


def findings(report: str, ours: re.Pattern) -> tuple[list[str], int]:
    """(errors in our kernels or in no kernel that is named, number of errors in other libraries' kernels) of a sanitizer's report."""
    mine, others = [], 0
    for block in re.split(r"^=========\s*$", report, flags=re.MULTILINE):
        lines = [line.removeprefix("=========").strip() for line in block.splitlines() if line.startswith("=========")]
        head = next((i for i, line in enumerate(lines) if HEADS.search(line)), None)
        if head is None:
            continue
        where = [line for line in lines[head : head + 4] if re.search(r"\bat ", line) and not line.startswith("Address")]
        if where and not any(ours.search(line) for line in where):
            others += 1
        else:
            mine.append(" | ".join(lines[head : head + 4]))
    return mine, others


def sanitize(session: Session, out: Path, tools: Iterable[str]) -> int:
    """Shards of the cases under every tool at once: each process is slow, and there are cores for many."""
    if not build(session):
        return session.end()
    compile_triton(session, limit=40)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None and not session.rehearse:
        session.finish("compute-sanitizer", 1, 0, "not found on PATH")
        return session.end()
    from tests.gpu.test_on_gpu import SHARDS

    halves = [" or ".join(f"shard{i}" for i in range(first, first + 2)) for first in range(0, SHARDS, 2)]
    backend = "rehearsal" if session.rehearse else "cuda"
    chosen = [f"sanitize and {backend} and ({part})" for part in (*halves, "users_sizes")]
    chosen += [] if session.rehearse else ["sanitize and triton"]
    ours = our_kernels()

    def job(tool: str, index: int, expression: str) -> None:
        prefix = [] if session.rehearse else [sanitizer, "--tool", tool, "--report-api-errors", "no", "--target-processes", "application-only"]
        status, report = session.step(
            f"{tool} {index + 1} of {len(chosen)}", [*prefix, *pytest("tests/gpu/test_on_gpu.py", "-k", expression, "-p", "no:xdist")],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, quiet=True,
        )  # fmt: skip
        with session.lock, (out / f"{tool}.txt").open("a") as file:
            file.write(f"### {expression}\n{report}\n")
        mine, others = findings(report, ours)
        session.record({"tool": tool, "cases": expression, "exit": status, "errors": mine[:20], "errors_count": len(mine), "in_other_kernels": others})
        if mine or others:
            session.say(f"   {tool}: {len(mine)} errors in our kernels, {others} in other libraries'")
        for line in mine[:5]:
            session.say(f"   {line}")
        if mine:
            session.failed.append(f"{tool}: {len(mine)} errors")

    for tool in tools:
        (out / f"{tool}.txt").unlink(missing_ok=True)
    with ThreadPoolExecutor(workers()) as pool:
        jobs = [pool.submit(job, tool, index, expression) for index, expression in enumerate(chosen) for tool in tools]
        for future in jobs:
            future.result()
    return session.end()


def bench(session: Session, out: Path, peers: Path | None) -> int:
    """All records go to one file, OUT/results.jsonl; `python -m benchmarks adopt FILE` files them under benchmarks/results/."""
    if not build(session):
        return session.end()
    device = "cpu" if session.rehearse else "cuda"
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 2)}
    if peers is not None:
        session.step("peers", [PYTHON, "-m", "benchmarks.peers", "build", str(peers)], threads)
        threads["COBRA_BENCH_PEERS"] = str(peers.resolve())
    if not session.rehearse:
        session.step("questions", [PYTHON, "-m", "benchmarks.gpu_questions", "--file", str(out / "questions.json")], threads)
    left = int(session.deadline - time.monotonic())
    quick = ["--quick", "--only", "rms_norm"] if session.rehearse else []
    (out / "results.jsonl").unlink(missing_ok=True)
    command = [PYTHON, "-m", "benchmarks", "--device", device, "--file", str(out / "results.jsonl"), "--within", str(left), *quick]
    session.step("bench", command, threads)
    return session.end()


# What ncu is asked for, and what the table calls it.
METRICS = {
    "gpu__time_duration.sum": "time",
    "smsp__inst_executed.sum": "issue slots",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots busy",
    "smsp__inst_executed_pipe_xu.sum": "MUFU instructions",
    "smsp__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "MUFU pipe busy",
    "smsp__inst_executed_pipe_fma.sum": "FMA pipe instructions",
    "dram__bytes_read.sum": "DRAM read",
    "dram__bytes_write.sum": "DRAM written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM busy",
    "lts__t_bytes.sum": "L2 bytes",
    "lts__t_sector_hit_rate.pct": "L2 hits",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps resident",
    "smsp__cycles_elapsed.avg.per_second": "SM clock",
    "launch__registers_per_thread": "registers per thread",
}


def sources_of(kernel: str) -> set[str]:
    """Files of csrc/ that hold a kernel with this in its name, by csrc/nvcc_table.tsv."""
    rows = [line.split("\t") for line in (ROOT / "csrc" / "nvcc_table.tsv").read_text().splitlines()[2:]]
    return {source for source, name, *_ in rows if kernel in name}


def op_of(kernel: str) -> str | None:
    """The op whose kernels hold this name: of the only room that has one, or the op it begins with."""
    from tests.gpu.cases import OPS

    rooms = {source.split("/")[0] for source in sources_of(kernel)}
    room = rooms.pop() if len(rooms) == 1 else max((name for name in OPS if kernel.startswith(name)), key=len, default=None)
    return "mlp_projector" if room == "projector" else room if room in OPS else None


def profile(session: Session, kernel: str, op: str | None, shape: str | None) -> int:
    """ncu on three launches of the kernels whose name holds `kernel`, from the op's own bench inputs."""
    if not build(session):
        return session.end()
    kernel = re.split(r"[<(]", kernel)[0]  # ncu matches names without template arguments
    op = op or op_of(kernel)
    if op is None:
        session.finish("profile", 2, 0, f"KERNEL={kernel} is of no op, or of several (csrc/nvcc_table.tsv); say OP=")
        return session.end()
    run = [PYTHON, "-m", "benchmarks.once", op, "--device", "cpu" if session.rehearse else "cuda", *(["--shape", shape] if shape else [])]
    if sources_of(kernel) and all(source.endswith("_bwd.cu") for source in sources_of(kernel)):
        run.append("--backward")
    ncu = shutil.which("ncu")
    if session.rehearse:
        session.step("run", run)
        return session.end()
    if ncu is None:
        session.finish("ncu", 1, 0, "not found on PATH")
        return session.end()
    command = [ncu, "--clock-control", "none", "--kernel-name", f"regex:{kernel}", "--launch-skip", "3", "--launch-count", "3", "--csv", "--page", "raw"]
    status, report = session.step("ncu", [*command, "--metrics", ",".join(METRICS), *run])
    for line in counters(report):
        session.say(line)
    return session.end()


def counters(report: str) -> list[str]:
    """ncu's CSV as one block of lines per launch."""
    import csv

    table = [line for line in report.splitlines() if line.startswith('"')]
    if len(table) < 3:
        return []
    heads, units, *rows = csv.reader(table)
    lines = []
    for row in rows:
        values = dict(zip(heads, row, strict=False))
        lines.append(f"{values.get('Kernel Name', '?')}  grid {values.get('Grid Size', '?')} block {values.get('Block Size', '?')}")
        unit = dict(zip(heads, units, strict=False))
        lines += [f"  {label:24} {values[name]:>18} {unit[name]}" for name, label in METRICS.items() if name in values]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=list(MINUTES))
    parser.add_argument("kernel", nargs="?", help="of profile: a part of the kernel's name, beginning with its op's")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--peers", type=Path, help="of bench: a folder with sdists of mamba_ssm and causal_conv1d")
    parser.add_argument("--op", help="of profile: the op whose bench launches the kernel")
    parser.add_argument("--shape", help="of profile: the bench's shape")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="of sanitize: only this tool (repeatable)")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on the cpu backend")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    if not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("gpu: torch sees no CUDA device; --rehearse runs the steps on the CPU", file=sys.stderr)
            return 2
    if args.verb == "profile" and not args.kernel:
        parser.error("profile: KERNEL is missing")
    session = Session(args.verb, args.out, args.rehearse)
    if args.verb == "test":
        return test(session)
    if args.verb == "sanitize":
        return sanitize(session, args.out, args.tool or TOOLS)
    if args.verb == "bench":
        return bench(session, args.out, args.peers)
    return profile(session, args.kernel, args.op, args.shape)


if __name__ == "__main__":
    sys.exit(main())
