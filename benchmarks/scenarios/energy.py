"""Joules of a call, where the device keeps a counter: NVML's on a GPU (needs pynvml), RAPL's on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.timing import CudaTimer, Provider

RAPL = Path("/sys/class/powercap/intel-rapl:0")  # package 0; AMD processors report under the same name
WINDOW = 1.0  # seconds: the counters move every 20 to 100 ms


def counter(device: str) -> tuple[Callable[[], float], str] | None:
    """(a function that reads joules used so far, the counter's name), or None when this device has none that we may read."""
    if torch.device(device).type == "cuda":
        try:
            import pynvml

            pynvml.nvmlInit()
            properties = torch.cuda.get_device_properties(device)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception:  # not installed, no driver, a device without the counter: pynvml has an exception for each
            return None
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3, "NVML, whole board"
    try:
        int((RAPL / "energy_uj").read_text())
    except (OSError, ValueError):
        return None
    return lambda: int((RAPL / "energy_uj").read_text()) * 1e-6, "RAPL, package 0"


def joules_per_call(provider: Provider, device: str, window: float = WINDOW) -> tuple[float | None, str]:
    """(joules of one call over a window of calls, the counter), or (None, why there is no figure). Idle power is included:
    it is what a run costs. What was timed as a CUDA graph is replayed as one here."""
    found = counter(device)
    if found is None:
        return None, "no energy counter that this process may read"
    read, source = found
    inputs = provider.make_inputs(0) if provider.make_inputs else ()
    on_gpu = torch.device(device).type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None

    def once() -> None:
        provider.call(*inputs)

    work = (CudaTimer.capture(once) if on_gpu and provider.graph else None) or once
    synchronize()
    calls, begin, start = 0, read(), time.perf_counter()
    while calls == 0 or time.perf_counter() - start < window:
        work()
        synchronize()
        calls += 1
    used = read() - begin
    if used < 0:  # RAPL's counter wraps
        return None, f"{source}: the counter wrapped"
    return used / calls, source
