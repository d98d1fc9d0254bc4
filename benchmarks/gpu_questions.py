"""What only a GPU can answer, in a minute: latencies and rates of the instructions the kernels are built from, hand-over between
two multiprocessors, the clock under load, the roofs. `python -m benchmarks.gpu_questions [--file FILE]`

The designs in the rooms' READMEs are counted from disassembly with assumed latencies; this table replaces the assumptions. Each
probe runs on one multiprocessor (csrc/roof) and is timed by its clock: `warps` on each of four schedulers, each warp with
`chains` independent chains of the instruction. One chain of one warp gives the latency, many of many the rate."""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import roofline
from benchmarks.harness.environment import stamp
from benchmarks.harness.table import figures, print_table
from benchmarks.harness.timing import quantile

# Order of enum class Probe in csrc/roof/roof.h -> (instruction, multiply-adds of one warp instruction)
PROBES = {
    "ex2": ("MUFU.EX2", 0), "fma": ("FFMA", 32), "mma tf32": ("HMMA.1688.F32.TF32", 16 * 8 * 8), "mma bf16": ("HMMA.16816.F32.BF16", 16 * 8 * 16),
    "lds 128": ("LDS.128 broadcast (and two LOP3)", 0), "shfl": ("SHFL.BFLY", 0),
}  # fmt: skip
SCHEDULERS = 4
ITERATIONS = 4096
SETTINGS = tuple((warps, chains) for warps in (1, 2, 4, 8) for chains in (1, 4, 8))
HANDOVERS = 2000


@dataclass(frozen=True)
class Answer:
    """One probe at one setting. `clocks_per_instruction` is what a scheduler needs for each; a warp sees `warps` times that."""

    probe: str
    warps: int  # per scheduler
    chains: int
    clocks: float  # of the slowest warp, median over runs

    @property
    def clocks_per_instruction(self) -> float:
        return self.clocks / (ITERATIONS * self.chains * self.warps)

    @property
    def clocks_of_a_warp(self) -> float:
        """Between two instructions of one chain: the latency, when there is one warp with one chain."""
        return self.clocks / ITERATIONS

    @property
    def lanes_per_clock(self) -> float:
        """Results per clock of the whole multiprocessor."""
        return 32 * SCHEDULERS / self.clocks_per_instruction


def library() -> ctypes.CDLL:
    from cobra_kernels import extension

    loaded = ctypes.CDLL(str(extension.PATH))
    pointer, word = ctypes.c_void_p, ctypes.c_int64
    loaded.cobra_probe_cuda.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, word, pointer, pointer, pointer]
    loaded.cobra_handover_cuda.argtypes = [word, pointer, pointer, pointer, pointer]
    return loaded


def probe_runner() -> Callable[[int, int, int, int], list[int]]:
    """run(probe, chains, warps, iterations) -> clocks of every warp."""
    launch = library().cobra_probe_cuda
    sink = torch.empty(1024, device="cuda")
    clocks = torch.zeros(32, dtype=torch.int64, device="cuda")

    def run(probe: int, chains: int, warps: int, iterations: int) -> list[int]:
        status = launch(probe, chains, warps, iterations, sink.data_ptr(), clocks.data_ptr(), torch.cuda.current_stream().cuda_stream)
        if status:
            raise RuntimeError(f"probe {probe}: the CUDA launch failed with cudaError {status}")
        return clocks.tolist()[: SCHEDULERS * warps]

    return run


def ask(run: Callable[[int, int, int, int], list[int]], repeats: int = 5) -> list[Answer]:
    """Every probe at every setting; the first run of each, which loads the code, is not counted."""
    answers = []
    for index, name in enumerate(PROBES):
        for warps, chains in SETTINGS:
            samples = [max(run(index, chains, warps, ITERATIONS)) for _ in range(repeats + 1)][1:]
            answers.append(Answer(name, warps, chains, quantile(samples, 0.5)))
    return answers


def handover_seconds() -> float | None:
    """Seconds from one block's write to the other's read, one way, or None when the blocks were not resident together."""
    launch = library().cobra_handover_cuda
    flags = torch.zeros(2, dtype=torch.int32, device="cuda")
    payload = torch.zeros(2 * 128, device="cuda")
    stopwatch = torch.zeros(3, dtype=torch.int64, device="cuda")
    for _ in range(2):  # the first run loads the code
        flags.zero_()
        status = launch(HANDOVERS, flags.data_ptr(), payload.data_ptr(), stopwatch.data_ptr(), torch.cuda.current_stream().cuda_stream)
        if status:
            raise RuntimeError(f"handover: the CUDA launch failed with cudaError {status}")
    _, nanoseconds, rounds = stopwatch.tolist()
    return nanoseconds * 1e-9 / (2 * rounds) if rounds == HANDOVERS else None


def rows(answers: list[Answer], clock_mhz: float, multiprocessors: int) -> list[list[str]]:
    table = []
    for a in answers:
        instruction, multiply_adds = PROBES[a.probe]
        teraflops = 2e-6 * multiply_adds * SCHEDULERS / a.clocks_per_instruction * clock_mhz * multiprocessors
        table.append(
            [
                instruction if (a.warps, a.chains) == SETTINGS[0] else "", str(a.warps), str(a.chains), figures(a.clocks_per_instruction),
                figures(a.clocks_of_a_warp), figures(a.lanes_per_clock), figures(teraflops) if multiply_adds else "-",
            ]
        )  # fmt: skip
    return table


COLUMNS = [
    ("instruction", "<"), ("warps", ">"), ("chains", ">"), ("clocks each", ">"), ("clocks of a chain", ">"), ("lanes/clock", ">"), ("TFLOP/s", ">"),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu_questions", description=__doc__)
    p.add_argument("--file", type=Path, help="write the answers to FILE, as JSON")
    args = p.parse_args(argv)
    from cobra_kernels import extension

    if not torch.cuda.is_available() or not extension.cuda_images():
        print("gpu_questions: needs a CUDA device and an extension with CUDA kernels")
        return 2
    roofs = roofline.machine_roofs("cuda", copy_bytes=1 << 32)
    answers = ask(probe_runner())
    handover = handover_seconds()
    properties = torch.cuda.get_device_properties("cuda")
    clock = roofs["clock_mhz"]
    title = f"{properties.name}, {properties.multi_processor_count} multiprocessors, {clock:.0f} MHz under exp2"
    print_table(title, COLUMNS, rows(answers, clock, properties.multi_processor_count))
    print_table("roofs", [("roof", "<"), ("value", ">")], [[name, figures(value)] for name, value in roofs.items()])
    expected = 16 * properties.multi_processor_count * clock * 1e-3
    print(f"exp2 floor: {roofs['exp_per_ns'] / expected:.1%} of 16 per clock and multiprocessor")
    print("hand-over between two blocks: " + (f"{handover * 1e6:.2f} us one way" if handover else "the blocks were not resident together"))
    if args.file:
        args.file.parent.mkdir(parents=True, exist_ok=True)
        values = {"roofs": roofs, "handover_seconds": handover, "probes": [asdict(a) for a in answers], "environment": stamp("cuda")}
        args.file.write_text(json.dumps(values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
