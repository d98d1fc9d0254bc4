"""What `make test` runs: the parallel tests on two single-thread workers, then the tests that change the thread count.

Arguments are passed to pytest. The time table at the end is printed by conftest.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pytest(*args: str, threads: int) -> int:
    """Exit status of one pytest run with `threads` torch threads per process; 5 (nothing collected) counts as success."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    status = subprocess.run([sys.executable, "-m", "pytest", *args], cwd=ROOT, env=environment, check=False).returncode
    return 0 if status == 5 else status


def main() -> int:
    """Both runs, whatever the first one says."""
    extra = sys.argv[1:]
    alone = pytest("-m", "threads", *extra, threads=2)
    workers = str(min(os.cpu_count() or 1, 8))
    parallel = pytest("-m", "not threads", "-n", workers, "--dist", "worksteal", *extra, threads=1)
    return alone or parallel


if __name__ == "__main__":
    sys.exit(main())
