"""Roofs, measured in the same run, interleaved with what they judge: the same rounds, the same timer, the same rotation.

copy    a copy of the same number of bytes: half read, half written, buffers rotated like the op's own
read    a sum over the same number of bytes
matmul  fp32 matrix product of 1536^3, large enough to be at its peak, by the fastest library in torch
exp     our exp2 loop on L1-resident data at the active instruction-set level, on every thread

A datasheet is no roof: on a shared or throttled machine these fall together with the op, and the fraction stays honest."""

from __future__ import annotations

import argparse
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.harness.bench import Cost
from benchmarks.harness.timing import Provider, Timing, compare, measure

KINDS = ("copy", "read", "matmul", "exp")
MATMUL_SIZE = 1536
EXP_BLOCKS = 1024
EXP_COUNT = EXP_BLOCKS * 4096  # kExp2BlockSize of csrc/roof/roof.h; a test compares


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


def matmul_providers(device: str = "cpu") -> list[Provider]:
    """Every library for it that this torch carries; the fastest is the roof. On a CPU torch.mm is MKL, which is half as fast as
    oneDNN on processors of another maker."""

    def make(index: int) -> tuple:
        generator = torch.Generator(device).manual_seed(index)
        size = (MATMUL_SIZE, MATMUL_SIZE)
        return torch.randn(size, generator=generator, device=device), torch.randn(size, generator=generator, device=device)

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


def exp_provider() -> Provider:
    function = exp2_floor()
    return Provider("roof exp", lambda: function(EXP_BLOCKS), lambda index: ())


def roof_for(kind: str, cost: Cost, device: str = "cpu") -> Roof:
    """The roof of one case. A kind that this device has no measurement for gives no fraction rather than a guess."""
    if kind == "copy":
        return Roof(kind, 1.0, [copy_provider(cost.bytes, device)])
    if kind == "read":
        return Roof(kind, 1.0, [read_provider(cost.bytes, device)])
    if kind == "matmul":
        return Roof(kind, cost.flops / (2 * MATMUL_SIZE**3), matmul_providers(device))
    if kind == "exp" and device == "cpu" and exp2_floor() is not None:
        return Roof(kind, cost.exps / EXP_COUNT, [exp_provider()])
    if kind in ("", "exp"):
        return Roof()
    raise ValueError(f"roof_for: kind has {kind!r}, expected one of {KINDS} or ''")


def machine_roofs(device: str = "cpu", seconds: float = 0.5, copy_bytes: int = 1 << 28) -> dict[str, float]:
    """{"copy_gbps", "read_gbps", "matmul_gflops", "exp_per_ns"} of this machine, cold, at one large size."""
    providers = [copy_provider(copy_bytes, device), read_provider(copy_bytes, device), *matmul_providers(device)]
    if device == "cpu" and exp2_floor() is not None:
        providers.append(exp_provider())
    t = measure(providers, seconds=seconds, device=device)
    roofs = {
        "copy_gbps": copy_bytes / t["roof copy"].median * 1e-9,
        "read_gbps": copy_bytes / t["roof read"].median * 1e-9,
        "matmul_gflops": 2 * MATMUL_SIZE**3 / min(v.median for k, v in t.items() if k.startswith("roof matmul")) * 1e-9,
    }
    if "roof exp" in t:
        roofs["exp_per_ns"] = EXP_COUNT / t["roof exp"].median * 1e-9
    return roofs


def main(argv: list[str] | None = None) -> int:
    from benchmarks.harness.table import figures, print_table

    p = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Measure the roofs of this machine.")
    p.add_argument("--device", default="cpu")
    args = p.parse_args(argv)
    rows = [[name, figures(value)] for name, value in machine_roofs(args.device).items()]
    print_table(f"roofs, {torch.get_num_threads()} threads", [("roof", "<"), ("value", ">")], rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
