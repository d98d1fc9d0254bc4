"""Roofs, measured in the same run, interleaved with what they judge: the same rounds, the same timer, the same rotation.

copy    a copy of the same number of bytes: half read, half written, buffers rotated like the op's own
read    a sum over the same number of bytes
matmul  matrix product large enough to be at its peak, by the fastest library in torch: fp32 1536^3 on a CPU, bf16 8192^3 on a GPU
exp     our exp2 loop: on L1-resident data at the active instruction-set level, on every thread; on a GPU in registers, on every
        multiprocessor

A datasheet is no roof: on a shared or throttled machine these fall together with the op, and the fraction stays honest."""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness.bench import Cost
from benchmarks.harness.environment import ROOT
from benchmarks.harness.records import RESULTS
from benchmarks.harness.timing import Provider, Timing, compare, measure

KINDS = ("copy", "read", "matmul", "exp")
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
EXP_BLOCKS = 1024
EXP_COUNT = EXP_BLOCKS * 4096  # kExp2BlockSize of csrc/roof/roof.h; a test compares
CUDA_EXP_ITERATIONS, CUDA_EXP_PER_ITERATION = 2048, 256 * 8  # kExp2Threads x kExp2Chains


@dataclass(frozen=True)
class Roof:
    """`providers` is empty when there is no roof. The op could run in `scale` times the time of the roof's provider."""

    kind: str = ""
    scale: float = 1.0
    providers: list[Provider] = field(default_factory=list)

    def judge(self, timing: Timing, timings: dict[str, Timing]) -> tuple[float | None, float | None]:
        """(seconds that the roof allows, fraction of it reached), the fraction from the rounds that both ran in."""
        if not self.providers:
            return None, None
        best = min((timings[p.name] for p in self.providers), key=lambda t: t.median)
        return best.median * self.scale, compare(best, timing).median * self.scale


def _empty_pair(count: int, device: str) -> Callable[[int], tuple]:
    def make(index: int) -> tuple:
        return torch.full((count,), float(index), device=device), torch.zeros(count, device=device)

    return make


def copy_provider(count_bytes: int, device: str = "cpu") -> Provider:
    return Provider("roof copy", lambda src, dst: dst.copy_(src), _empty_pair(max(1, count_bytes // 8), device))


def read_provider(count_bytes: int, device: str = "cpu") -> Provider:
    def make(index: int) -> tuple:
        return (torch.full((max(1, count_bytes // 4),), float(index), device=device),)

    return Provider("roof read", lambda src: src.sum(), make)


def matmul_flops(device: str = "cpu") -> int:
    return 2 * MATMUL_SIZE[torch.device(device).type] ** 3


def matmul_providers(device: str = "cpu") -> list[Provider]:
    """Every library for it that this torch carries; the fastest is the roof. On a CPU torch.mm is MKL, which is half as fast as
    oneDNN on processors of another maker."""
    kind = torch.device(device).type
    size = (MATMUL_SIZE[kind],) * 2

    def make(index: int) -> tuple:
        generator = torch.Generator(device).manual_seed(index)
        dtype = torch.float32 if kind == "cpu" else torch.bfloat16
        return tuple(torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2))

    providers = [Provider("roof matmul", torch.mm, make)]
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    if device == "cpu" and onednn is not None:
        providers.append(Provider("roof matmul onednn", lambda a, b: onednn(a, b, None, "none", [], ""), make))
    return providers


@functools.cache
def exp2_floor() -> Callable[[int], int] | None:
    """csrc/roof: evaluates exp2 of that many blocks of L1-resident floats on torch's threads and returns how many floats
    that were. None without the extension."""
    from cobra_kernels import extension

    if extension.absence() is not None:
        return None
    function = ctypes.CDLL(str(extension.PATH)).cobra_exp2_floor  # the library that is already loaded
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64]
    return function


class CudaExp:
    """csrc/roof on a GPU: exp2 of values in registers, enough warps on every multiprocessor. Measures the clock it ran at, too."""

    def __init__(self, device: str) -> None:
        from cobra_kernels import extension

        self.launch = ctypes.CDLL(str(extension.PATH)).cobra_exp2_floor_cuda
        self.launch.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self.blocks = 8 * torch.cuda.get_device_properties(device).multi_processor_count
        self.count = self.blocks * CUDA_EXP_PER_ITERATION * CUDA_EXP_ITERATIONS
        self.sums = torch.empty(self.blocks * 256, device=device)
        self.stopwatch = torch.zeros(2, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        status = self.launch(self.blocks, CUDA_EXP_ITERATIONS, self.sums.data_ptr(), self.stopwatch.data_ptr(), stream)
        if status:
            raise RuntimeError(f"exp2 floor: the CUDA launch failed with cudaError {status}")

    def clock_mhz(self) -> float:
        """The multiprocessors' clock during the last call."""
        clocks, nanoseconds = self.stopwatch.tolist()
        return 1e3 * clocks / max(nanoseconds, 1)


@functools.cache
def cuda_exp(device: str) -> CudaExp | None:
    """None without CUDA kernels in the extension."""
    from cobra_kernels import extension

    return CudaExp(device) if extension.cuda_images() and torch.cuda.is_available() else None


def running_clock_mhz(device: str) -> float | None:
    """Clock of a GPU that is at work now; call it straight after a measurement."""
    exp = cuda_exp(device) if torch.device(device).type == "cuda" else None
    if exp is None:
        return None
    exp()
    return round(exp.clock_mhz(), 1)


def exp_provider(device: str = "cpu") -> tuple[Provider, int] | None:
    """(provider, exponentials of one call), or None without a floor for this device."""
    if torch.device(device).type == "cuda":
        exp = cuda_exp(device)
        return (Provider("roof exp", exp, lambda index: ()), exp.count) if exp else None
    function = exp2_floor()
    return (Provider("roof exp", lambda: function(EXP_BLOCKS), lambda index: ()), EXP_COUNT) if function else None


def roof_for(kind: str, cost: Cost, device: str = "cpu") -> Roof:
    """The roof of one case. A kind that this device has no measurement for gives no fraction rather than a guess."""
    if kind == "copy":
        return Roof(kind, 1.0, [copy_provider(cost.bytes, device)])
    if kind == "read":
        return Roof(kind, 1.0, [read_provider(cost.bytes, device)])
    if kind == "matmul":
        return Roof(kind, cost.flops / matmul_flops(device), matmul_providers(device))
    if kind == "exp" and (exp := exp_provider(device)) is not None:
        return Roof(kind, cost.exps / exp[1], [exp[0]])
    if kind in ("", "exp"):
        return Roof()
    raise ValueError(f"roof_for: kind has {kind!r}, expected one of {KINDS} or ''")


def machine_roofs(device: str = "cpu", seconds: float = 0.5, copy_bytes: int = 1 << 28) -> dict[str, float]:
    """{"copy_gbps", "read_gbps", "matmul_gflops", "exp_per_ns"} of this machine, cold, at one large size; of a GPU "clock_mhz" too."""
    providers = [copy_provider(copy_bytes, device), read_provider(copy_bytes, device), *matmul_providers(device)]
    exp = exp_provider(device)
    providers += [exp[0]] if exp else []
    t = measure(providers, seconds=seconds, device=device)
    roofs = {
        "copy_gbps": copy_bytes / t["roof copy"].median * 1e-9,
        "read_gbps": copy_bytes / t["roof read"].median * 1e-9,
        "matmul_gflops": matmul_flops(device) / min(v.median for k, v in t.items() if k.startswith("roof matmul")) * 1e-9,
    }
    if "roof exp" in t:
        roofs["exp_per_ns"] = exp[1] / t["roof exp"].median * 1e-9
    clock = running_clock_mhz(device)
    if clock is not None:
        roofs["clock_mhz"] = clock
    return roofs


def plot(results: Path, out: Path) -> int:
    from benchmarks import roofplot

    try:
        drawn = [path for folder in sorted(results.glob("*/")) for path in roofplot.draw(folder, out)]
    except ImportError as error:
        print(f"--plot: {error}; pip install matplotlib")
        return 2
    print("\n".join(os.path.relpath(path) for path in drawn) or f"no records with a roof under {os.path.relpath(results)}: make bench")
    return 0 if drawn else 1


def main(argv: list[str] | None = None) -> int:
    from benchmarks.harness.table import figures, print_table

    p = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Measure the roofs of this machine, or draw those of the records.")
    p.add_argument("--device", default="cpu")
    p.add_argument("--plot", action="store_true", help="measure nothing: draw every device's records under its roofs")
    p.add_argument("--results", type=Path, default=RESULTS, help="of --plot: folder of <device>/<op>.jsonl (default: benchmarks/results)")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="of --plot: folder of the pictures (default: out/bench)")
    args = p.parse_args(argv)
    if args.plot:
        return plot(args.results, args.out)
    rows = [[name, figures(value)] for name, value in machine_roofs(args.device).items()]
    print_table(f"roofs, {torch.get_num_threads()} threads", [("roof", "<"), ("value", ">")], rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
