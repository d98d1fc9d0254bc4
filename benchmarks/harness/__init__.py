"""One way to measure, for every benchmark: timing.py (how), environment.py (where), records.py (what is kept),
table.py (what is printed), bench.py (the frame of one bench_<op>.py)."""

from benchmarks.harness.bench import Bench, Case, Cost, run_bench
from benchmarks.harness.timing import Provider, Ratio, Timing, compare, measure

__all__ = ["Bench", "Case", "Cost", "Provider", "Ratio", "Timing", "compare", "measure", "run_bench"]
