"""What must agree for results to be one run, and what changes while it runs."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.harness.environment import ROOT, commit, cpu_level, device_name

# Reasons of a GPU to lower its clock that are news: power cap, slowdown, temperature, brake; not idleness or a wish.
THROTTLE = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def source() -> str:
    """The commit, with a hash of what differs from it: "1404c06f3c9a", "1404c06f3c9a+3f2a91bc"."""
    head = commit()["commit"] or "none"
    try:
        diff = subprocess.run(
            ["git", "-C", str(ROOT), "diff", "HEAD", "--", ".", ":!benchmarks/results"], check=False, capture_output=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        diff = b""
    return f"{head}+{hashlib.sha256(diff).hexdigest()[:8]}" if diff else head


def identity(device: str, settings: dict) -> dict:
    """Equal for all results of one run: the machine (without naming it), the source, the software, the settings."""
    there = torch.device(device).type == "cpu" or torch.cuda.is_available()
    machine = hashlib.sha256((_read("/etc/machine-id") or platform.node()).encode()).hexdigest()[:12]
    return {
        "machine": machine, "device": device_name(device) if there else f"no {device} device", "cores": os.cpu_count(),
        "cpu_level": cpu_level(), "threads": torch.get_num_threads(), "source": source(), "torch": torch.__version__,
        "python": platform.python_version(), **settings,
    }  # fmt: skip


def pulse() -> float:
    """Seconds of a fixed loop that touches no memory, the fastest of five. A virtual machine hides its clock: this shows a change."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        sum(range(100_000))
        best = min(best, time.perf_counter() - start)
    return best


def _temperature() -> float | None:
    """The hottest sensor of the processor, in degrees Celsius."""
    files = [*Path("/sys/class/thermal").glob("thermal_zone*/temp"), *Path("/sys/class/hwmon").glob("hwmon*/temp*_input")]
    values = [int(text) / 1000 for text in map(_read, files) if re.fullmatch(r"-?\d+", text)]
    return max((v for v in values if 0 < v < 150), default=None)


def sensors(device: str = "cpu") -> dict:
    """What the machine tells of itself now; a value that it does not tell is left out."""
    clocks = [float(c) for c in re.findall(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"))]
    values = {
        "pulse_seconds": pulse(), "load_average": round(os.getloadavg()[0], 2), "cpu_mhz": max(clocks, default=None),
        "cpu_celsius": _temperature(),
    }  # fmt: skip
    if torch.device(device).type == "cuda":
        values |= _gpu(torch.device(device).index or 0)
    return {key: value for key, value in values.items() if value is not None}


def _gpu(index: int) -> dict:
    fields = ("clocks.sm", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", str(index)]
    try:
        text = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [v.strip() for v in text.split(",")]
    if len(values) != len(fields):
        return {}

    def number(value: str) -> float | None:
        return float(value) if re.fullmatch(r"[\d.]+", value) else None

    throttle = int(values[3], 16) & THROTTLE if re.fullmatch(r"0x[0-9a-fA-F]+", values[3]) else None
    return {"gpu_mhz": number(values[0]), "gpu_celsius": number(values[1]), "gpu_watts": number(values[2]), "gpu_throttle": throttle}


def thermal_notes(before: dict, after: dict) -> list[str]:
    """What changed between two readings and makes a comparison across them doubtful."""
    notes = []
    if "pulse_seconds" in before and "pulse_seconds" in after:
        ratio = after["pulse_seconds"] / before["pulse_seconds"]
        if abs(ratio - 1) > 0.05:
            word = "slower" if ratio > 1 else "faster"
            notes.append(f"the processor became {abs(ratio - 1):.0%} {word} meanwhile (a fixed loop before and after)")
    for key, what in (("cpu_celsius", "processor"), ("gpu_celsius", "GPU")):
        if key in before and key in after and after[key] - before[key] >= 10:
            notes.append(f"the {what} went from {before[key]:.0f} to {after[key]:.0f} degrees Celsius")
    if after.get("gpu_throttle"):
        notes.append(f"the GPU held its clock back (reasons 0x{after['gpu_throttle']:x})")
    return notes
