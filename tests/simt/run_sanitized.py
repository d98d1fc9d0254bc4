"""Runs every room's cases under sanitizers, in a process without torch: CPU kernels and emulated CUDA kernels.

    python tests/simt/run_sanitized.py asan tsan [--room rms_norm]

asan (AddressSanitizer + UBSan) finds accesses outside a buffer, shared memory included, misaligned vectors, undefined
arithmetic. tsan (ThreadSanitizer) finds two threads, emulated or real, that touch one place without a barrier between.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.simt import harness  # noqa: E402

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:history_size=4",
}
LIBRARIES = {"host": [], "asan": ["libasan.so", "libubsan.so"], "tsan": ["libtsan.so"]}
# AddressSanitizer sees what a run touches: threads in order, where asynchronous copies come late, and not in order. To ThreadSanitizer
# only barriers, collectives, fences and atomics order two threads, not who ran first; blocks race only when resident together.
SIMT = {
    "asan": [{"order": "forward"}, {"order": "random", "seed": 5}],
    "tsan": [{"order": "random", "seed": 5, "resident": 3}],
    "host": [{"order": "forward"}],
}


def rooms() -> list[str]:
    """Names of the room_<op>.py files of this folder."""
    return [path.stem.removeprefix("room_") for path in sorted(Path(__file__).parent.glob("room_*.py"))]


def child_command(target: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a Python that can load a module built with this sanitizer."""
    preload = [subprocess.run(["g++", f"-print-file-name={lib}"], capture_output=True, text=True, check=True).stdout.strip()
               for lib in LIBRARIES[target]]  # fmt: skip
    environment = os.environ | OPTIONS | {"OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"LD_PRELOAD": " ".join(preload)} if preload else {}
    command = [sys.executable, str(Path(__file__).resolve()), target, *arguments]
    # TSan of gcc 12 wants the memory map that Linux had before it grew more random.
    setarch = shutil.which("setarch")
    if target == "tsan" and setarch and subprocess.run([setarch, "-R", "true"], capture_output=True, check=False).returncode == 0:
        command = [setarch, "-R", *command]
    return command, environment


def run_probe(target: str, module: Path) -> None:
    """The emulator's own tests under the sanitizer: hand-over between blocks, and launches that fail and are dropped."""
    from tests.simt import test_simt

    host, start = harness.load_module(module), time.perf_counter()
    for order, seed in (("forward", 1), ("reverse", 1), ("random", 5)):
        test_simt.test_warp_collectives(host, order, seed)
        test_simt.test_language(host, order, seed)
        test_simt.test_tensor_core_instruction(host, order, seed)
        test_simt.test_named_barriers_and_asynchronous_copies(host, order, seed)
        for resident in (1, 3, 0):
            test_simt.test_block_barriers_and_shared_memory(host, order, seed, resident)
            test_simt.test_blocks_hand_over_by_ticket_with_any_number_resident(host, order, seed, resident)
        for what, message in test_simt.BROKEN_RULES:
            test_simt.test_a_broken_rule_is_an_exception(host, order, seed, what, message)
    test_simt.test_two_threads_launch_at_once(host)
    print(f"[{target}] emulator: {time.perf_counter() - start:.1f} s")


def run_cases(target: str, module: Path, names: list[str], only: str | None, simt: dict | None) -> None:
    """The cases of `names`, or the one case with id `only`, in this process; raises at the first that fails."""
    harness.guard = 64 if target == "host" else 0
    host = harness.load_module(module)
    levels = [level for level in ("scalar", "avx2", "avx512") if host.set_cpu_level(level)]
    if target == "tsan":
        levels = levels[-1:]  # they share out work among threads alike
    for name in names:
        room = importlib.import_module(f"tests.simt.room_{name}")
        cases = room.SANITIZED if only is None else [case for case in room.CASES if case.id == only]
        assert cases, f"no case {only} in room {name}"
        emulated = cases if "cuda" in harness.devices(room) else []
        if target == "tsan" and only is None and emulated:
            emulated = getattr(room, "RACES", cases)
        runs, start = 0, time.perf_counter()
        for options in SIMT[target] if simt is None else [simt]:
            for case in emulated:
                host.set_simt(**options, **({"max_grid_x": case.max_grid_x} if getattr(case, "max_grid_x", 0) else {}))
                room.check(host, case, "cuda")
                runs += 1
        if only is None:
            for level in levels:
                host.set_cpu_level(level)
                host.set_threads(2)
                for case in cases:
                    room.check(host, case, "cpu")
                    runs += 1
        print(f"[{target}] {name}: {len(cases)} cases, {runs} runs, {'cuda source emulated and ' if emulated else ''}cpu at {', '.join(levels)}, "
              f"{time.perf_counter() - start:.1f} s")  # fmt: skip


def run_job(target: str, module: Path, names: list[str]) -> tuple[int, str]:
    """(exit status, output) of the cases of these rooms, or of the emulator's own tests if there are none, in a process of its own."""
    command, environment = child_command(target, ["--module", str(module), *(f"--room={name}" for name in names)])
    done = subprocess.run(command, env=environment, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def main() -> int:
    """Builds, then runs each sanitizer on each room in a process of its own, as many at once as there are cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="*", metavar="asan|tsan", help="default: both")
    parser.add_argument("--room", action="append", choices=rooms(), help="only this room (may be repeated)")
    parser.add_argument("--module", type=Path, help=argparse.SUPPRESS)  # set in the child: the module to load
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--order", help=argparse.SUPPRESS)
    parser.add_argument("--resident", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--large-strides", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not set(options.target) <= set(LIBRARIES):
        parser.error(f"target is {options.target}, expected asan or tsan")
    if options.module:
        if options.large_strides:
            for name in options.room or rooms():
                room = importlib.import_module(f"tests.simt.room_{name}")
                if "cuda" in harness.devices(room):
                    room.check_large_strides(harness.load_module(options.module), "cuda")
        elif options.room:
            simt = {"order": options.order, "seed": 5, "resident": options.resident} if options.order else None
            run_cases(options.target[0], options.module, options.room, options.case, simt)
        else:
            run_probe(options.target[0], options.module)
        return 0
    modules = {target: harness.build_module(target) for target in options.target or ["asan", "tsan"]}
    names = sorted(options.room or rooms(), key=lambda name: name != "selective_scan")  # the longest, by far, first
    jobs = [(target, [name]) for target in reversed(modules) for name in names] + [(target, []) for target in modules]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(run_job, target, modules[target], names): target for target, names in jobs}
        for job in as_completed(running):
            code, output = job.result()
            print(output, end="", flush=True)
            if code:
                pool.shutdown(cancel_futures=True)
                print(f"[{running[job]}] failed with exit status {code}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
