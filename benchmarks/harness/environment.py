"""Where a number was measured: everything that a reader needs to repeat it, or to refuse it."""

from __future__ import annotations

import ctypes
import datetime
import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = Path("/sys/devices/system/cpu")


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(("git", "-C", str(ROOT), *args), check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict:
    """{"commit": short hash or None outside a checkout, "dirty": True when a tracked file differs from it}.

    Records and pictures do not change what is measured, so an appended result does not make the next bench dirty."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {"commit": _git("rev-parse", "--short=12", "HEAD"), "dirty": bool(changes)}


def cpu_name() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def cpu_level() -> str:
    """The instruction-set level that the CPU kernels run at: what the loaded kernels say; before that what they will pick."""
    extension = sys.modules.get("cobra_kernels.extension")
    if extension is not None and extension.cpu_level():
        return extension.cpu_level()
    forced = os.environ.get("COBRA_KERNELS_CPU_LEVEL")
    if forced:
        return forced
    flags = cpu_flags()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma", "f16c"} <= flags else "scalar"


@functools.cache
def last_level_cache_bytes(device: str = "cpu") -> int:
    """Largest cache between the cores and memory. 32 MiB when the system does not say: too large is safe, too small is warm."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [_read(index / "size") for index in CPU.glob("cpu0/cache/index*")]
    units = {"K": 1024, "M": 1024**2, "G": 1024**3}
    return max([int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units], default=32 * 1024**2)


def cpu_clock_mhz() -> str | None:
    """As the system states it, or None: in a virtual machine this is the nominal clock, not the one that ran."""
    clocks = re.findall(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo") or "")
    return "/".join(sorted(set(clocks))) or None


def device_name(device: str = "cpu") -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    name = cpu_name()
    if re.search(r"\d", name):
        return name
    # Some hypervisors hide the model ("AMD EPYC"): family and model numbers keep two generations apart.
    info = _read("/proc/cpuinfo") or ""
    ids = [re.search(rf"^{key}\s*:\s*(\d+)", info, re.MULTILINE) for key in ("cpu family", "model")]
    return " ".join([name, *(f"{k} {m.group(1)}" for k, m in zip(("family", "model"), ids) if m)])


def slug(name: str, cores: int | None = None) -> str:
    """Folder name of a device; of a CPU with its cores."""
    name = name.lower().replace("(r)", "").replace("(tm)", "").split("@")[0] + (f" {cores} cores" if cores else "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def device_slug(device: str = "cpu") -> str:
    """Folder name of the records of this device: "amd-epyc-family-25-model-1-2-cores", "nvidia-h200"."""
    return slug(device_name(device), os.cpu_count() if device == "cpu" else None)


def command_line() -> str:
    """What was typed, without the machine's own paths."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    script = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    return " ".join(["python", script, *(a.replace(str(ROOT) + os.sep, "") for a in sys.argv[1:])])


def _version(module: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None


def _gpu(device: str) -> dict:
    def smi(field: str) -> str | None:
        try:
            done = subprocess.run(
                ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", str(torch.device(device).index or 0)],
                check=False, capture_output=True, text=True, timeout=20,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "driver": smi("driver_version"),
        "sm_clock": smi("clocks.sm"),
        "memory_clock": smi("clocks.mem"),
        "power_limit": smi("power.limit"),
        "throttle": smi("clocks_throttle_reasons.active"),
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def stamp(device: str = "cpu") -> dict:
    """The environment of a record. Says what it cannot know with None, and never invents."""
    total = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo") or "")
    environment = {
        **commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command_line(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_level": cpu_level(),
        "torch_cpu_level": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache_bytes(device),
        "memory_bytes": int(total.group(1)) * 1024 if total else None,
        "clock_mhz": cpu_clock_mhz(),
        "governor": _read(CPU / "cpu0/cpufreq/scaling_governor"),
        "virtual_machine": "hypervisor" in cpu_flags(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "allocator": steady_allocator(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "env": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("COBRA_KERNELS_", "OMP_", "MKL_"))},
    }
    if device != "cpu":
        environment |= _gpu(device)
    return environment


@functools.cache
def steady_allocator() -> str:
    """Keep freed memory in the process, for every provider alike: otherwise a call that returns a large tensor is timed
    together with the page faults of a fresh mapping, and the order of the providers decides who pays. Call it early."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "system default (no mallopt)"
    if mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1) and mallopt(m_top_pad, 64 * 1024**2):
        return "glibc, memory kept (mmap_max 0, no trim)"
    return "system default (mallopt refused)"
