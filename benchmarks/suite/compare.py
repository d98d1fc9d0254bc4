"""Two runs side by side. Their rounds were not interleaved, so each median carries its own interval, and what a neighbour on the
machine did during one of them is part of the difference: the verdict is harness.timing's, the caution stays with the reader."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.harness.timing import Ratio, median_interval, quantile
from benchmarks.suite.results import results_of


@dataclass(frozen=True)
class Pair:
    """One entry of one case in both runs. ratio = time in the new run / time in the old."""

    case: str
    entry: str
    old: float  # median, seconds
    new: float
    ratio: Ratio

    @property
    def known(self) -> bool:
        """Whether there are samples enough for an interval."""
        return math.isfinite(self.ratio.high)

    @property
    def verdict(self) -> str:
        return self.ratio.verdict if self.known else "too few rounds"


def ratio_of(new: list[float], old: list[float]) -> Ratio:
    """Median over median. Each median lies in its interval with 99.5%, so the ratio in theirs with 99%, whatever the noise."""
    (new_low, new_high), (old_low, old_high) = median_interval(new, 0.005), median_interval(old, 0.005)
    low = new_low / old_high if math.isfinite(old_high) else 0.0
    high = new_high / old_low if old_low > 0 else math.inf
    return Ratio(quantile(new, 0.5) / quantile(old, 0.5), low, high, min(len(new), len(old)))


def pairs(new: dict, old: dict) -> list[Pair]:
    """Entries measured in both runs, in the order of the new one."""
    before = {(r["case"], r["entry"]): r for r in results_of(old) if r["record"] is not None}
    found = []
    for result in results_of(new):
        other = before.get((result["case"], result["entry"]))
        if result["record"] is not None and other is not None:
            ratio = ratio_of(result["samples"], other["samples"])
            found.append(Pair(result["case"], result["entry"], other["record"]["median"], result["record"]["median"], ratio))
    return found


def caution(new: dict, old: dict) -> list[str]:
    """What makes the two runs no fair pair, besides the change that is to be judged."""
    a, b = new["identity"], old["identity"]
    notes = [
        f"{key}: {a.get(key)} against {b.get(key)}"
        for key in ("machine", "device", "cores", "threads", "cpu_level", "torch", "python", "seconds", "seed")
        if a.get(key) != b.get(key)
    ]

    def pulse(run: dict) -> float | None:
        values = [case["sensors"]["before"]["pulse_seconds"] for case in run["cases"] if case.get("sensors")]
        return quantile(values, 0.5) if values else None

    mine, theirs = pulse(new), pulse(old)
    if mine and theirs and abs(mine / theirs - 1) > 0.05:
        word = "slower" if mine > theirs else "faster"
        notes.append(f"the processor itself was {abs(mine / theirs - 1):.0%} {word} in this run (a fixed loop before every case)")
    return notes
