"""`make room ROOM=<op> [BACKEND=..]`: the loop of a kernel developer. One screen: tests of that room (base case first), its
kernels under ASan and UBSan, its bench against the roof and the last record. Stops at the first red stage."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(p.name for p in (ROOT / "cobra_kernels" / "ops").iterdir() if (p / "op.py").exists())


def stage(name: str, command: list[str], environment: dict[str, str]) -> bool:
    """Runs one stage quietly: its last line when green, its last 40 lines when red."""
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    green = done.returncode == 0
    # The bench's notes on single rows (*) would fill the screen; its table marks the rows.
    shown = [line for line in lines if not line.startswith("* ")] if name == "bench" else lines[-1:] if green else lines[-40:]
    print(f"{'ok ' if green else 'RED'} {name:10} {time.monotonic() - start:5.1f} s  {shown[-1] if green and name != 'bench' and shown else ''}", flush=True)
    if not green or name == "bench":
        print("\n".join(shown))
    return green


def main() -> int:
    """Exit status 1 at the first red stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--backend", choices=("reference", "cpu", "triton", "cuda"), help="only this backend's tests and bench rows")
    args = parser.parse_args()
    python, room = sys.executable, args.room
    longer = [name for name in ROOMS if name.startswith(room) and name != room]  # causal_conv1d_update is not causal_conv1d
    tests = [p for p in sorted(ROOT.glob(f"tests/*/test_{room}*.py")) if not any(name in p.stem for name in longer)]
    # A backend's tests carry its name in their id; tests of every backend carry none and run too.
    others = [b for b in ("reference", "cpu", "triton", "cuda") if b != args.backend]
    chosen = ["-k", " and ".join(f"not {b}" for b in others)] if args.backend else []
    quick = {"OMP_NUM_THREADS": "1"}
    simt = [[python, "csrc/build.py", "host"]] if (ROOT / "csrc" / "host" / f"{room}_host.cpp").exists() else []
    stages = [("build", command) for command in ([python, "csrc/build.py", "ext"], *simt)]
    stages.append(("tests", [python, "-m", "pytest", "-n", "2", "-m", "not threads", *map(str, tests), *chosen]))
    if not simt:
        print(f"    sanitize   none: {room} has no csrc/host/{room}_host.cpp")
    else:
        stages.append(("sanitize", [python, "tests/simt/run_sanitized.py", "asan", "--room", room]))
    bench = [python, "-m", "benchmarks", "room", room, *(["--backend", args.backend] if args.backend else [])]
    stages.append(("bench", bench))
    return 0 if all(stage(name, command, {} if name == "bench" else quick) for name, command in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
