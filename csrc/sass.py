"""Counts what the inner loops of a CUDA kernel issue, from its disassembly: an estimate of its cost where there is no GPU.

    python csrc/sass.py rms_norm_fwd_vector_kernel                 every instance of the kernel, sm_90a
    python csrc/sass.py selective_scan_fwd --arch 80 --elements 32  per element, when an iteration does 32 per thread

An innermost loop is a backward branch with no other inside. Every instruction between its ends is counted, predicated ones
and both sides of a branch too: an upper bound of the issue slots of one iteration of one warp. Bytes are per thread. A kernel
without a loop is counted whole. cuobjdump and nvdisasm are taken from PATH, the CUDA toolkit, or the triton package.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build  # noqa: E402

# First dotted part of the opcode -> class. Anything else is "other"; every instruction is one issue slot.
CLASSES = {
    "MUFU": ("MUFU",),
    "FP32": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "FFMA32I", "FMUL32I", "FADD32I"),
    "FP16": ("HFMA2", "HADD2", "HMUL2", "HFMA2_MMA"),
    "IMAD": ("IMAD", "IDP", "IMUL"),
    "ALU": (
        "IADD3", "IADD", "LOP3", "LOP", "SHF", "LEA", "PRMT", "SEL", "FSEL", "ISETP", "FSETP", "FMNMX", "IMNMX", "PLOP3", "F2FP", "VIADD",
        "VIMNMX", "MOV", "P2R", "R2P", "IABS", "BMSK", "SGXT", "FCHK", "HSETP2", "HSET2", "HMNMX2", "VIADDMNMX", "FMNMX3", "CS2R", "S2R",
    ),
    "uniform": ("UIADD3", "ULOP3", "USHF", "ULEA", "UMOV", "UISETP", "UPLOP3", "USEL", "UIMAD", "ULDC", "UPRMT", "R2UR", "S2UR", "LDCU"),
    "MMA": ("HMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA"),
    "convert": ("F2F", "I2F", "F2I", "I2FP", "F2IP", "FRND"),
    "LDS": ("LDS", "LDSM"), "STS": ("STS", "STSM"), "LDG": ("LDG", "LD"), "STG": ("STG", "ST"), "LDGSTS": ("LDGSTS",),
    "local": ("LDL", "STL"), "atomic": ("ATOM", "ATOMG", "ATOMS", "RED"), "SHFL": ("SHFL",), "LDC": ("LDC",),
    "barrier": ("BAR", "WARPSYNC", "SYNCS", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR"), "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BREAK"),
    "NOP": ("NOP",),
}  # fmt: skip
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}
MEMORY = ("LDG", "STG", "LDGSTS", "LDS", "STS", "local")


@dataclass
class Count:
    """Of one loop, or of a whole kernel: issue slots by class, and bytes per thread of each kind of memory access."""

    where: str
    slots: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)

    @property
    def issued(self) -> int:
        return sum(self.slots.values())


def tools() -> Path | None:
    """A folder with cuobjdump and nvdisasm, or None: both on PATH, beside nvcc, or in the triton package."""
    folders = [Path(found).parent for found in [shutil.which("cuobjdump")] if found]
    nvcc = build.find_nvcc()
    if nvcc:
        folders.append(build.cuda_root(nvcc) / "bin")
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((f for f in folders if (f / "cuobjdump").exists() and (f / "nvdisasm").exists()), None)


def disassemble(cubin: Path, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}  # cuobjdump calls nvdisasm
    done = subprocess.run([folder / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def functions(listing: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """(mangled name, [(address, instruction)]) of every kernel of a `cuobjdump -sass` listing."""
    for part in re.split(r"\n\s*Function : ", listing)[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), [(int(a, 16), text.strip()) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)]


def opcode_of(instruction: str) -> str:
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def access_bytes(opcode: str) -> int:
    """Bytes per thread of a memory instruction: its width is a suffix, 4 when there is none. LDSM hands out 4 per matrix."""
    parts = opcode.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return 4 * next((int(p) for p in parts if p in ("1", "2", "4")), 1)
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
    return next((widths[p] for p in reversed(parts) if p in widths), 4)


def count(instructions: list[tuple[int, str]], where: str) -> Count:
    result = Count(where)
    for _, text in instructions:
        opcode = opcode_of(text)
        kind = CLASS_OF.get(opcode.split(".")[0], "other")
        if kind == "NOP":
            continue
        result.slots[kind] += 1
        if kind in MEMORY:
            result.bytes[kind] += access_bytes(opcode)
    return result


def loops(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last) address of every innermost loop. The branch to itself that ends each kernel is none."""
    ranges = set()
    for address, text in instructions:
        if opcode_of(text).split(".")[0] == "BRA":
            target = re.search(r"0x([0-9a-f]+)\s*$", text)
            if target and int(target[1], 16) < address:
                ranges.add((int(target[1], 16), address))
    merged: dict[int, int] = {}
    for first, last in ranges:  # `continue`: several branches to one head are one loop
        merged[first] = max(merged.get(first, 0), last)
    every = sorted(merged.items())
    return [(a, b) for a, b in every if not any((c, d) != (a, b) and a <= c and d <= b for c, d in every)]


def counts(instructions: list[tuple[int, str]]) -> list[Count]:
    """One Count per innermost loop, or one of the whole kernel when it has none."""
    inner = loops(instructions)
    if not inner:
        return [count(instructions, "no loop: whole kernel")]
    return [count([(a, t) for a, t in instructions if first <= a <= last], f"loop {first:04x}..{last:04x}") for first, last in inner]


def report(name: str, found: list[Count], elements: float) -> list[str]:
    unit = "per iteration" if elements == 1 else f"per element ({elements:g} in an iteration)"
    lines = [f"{name}  ({unit})"]
    for one in found:
        slots = "  ".join(f"{kind} {n / elements:.4g}" for kind, n in one.slots.most_common())
        moved = "  ".join(f"{kind} {n / elements:.4g} B" for kind, n in sorted(one.bytes.items()))
        lines += [f"  {one.where}: {one.issued / elements:.4g} issue slots", f"    {slots}"]
        lines += [f"    bytes per thread: {moved}"] if moved else []
    return lines


def main(argv: list[str] | None = None) -> int:
    """Builds the cubins of the sources that hold the kernel (as nvcc-check does) and prints its loops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", help="a part of the kernel's name, as csrc/nvcc_table.tsv writes it")
    parser.add_argument("--arch", default="90a", choices=build.ALL_ARCHS)
    parser.add_argument("--elements", type=float, default=1, help="elements that a thread does in an iteration; counts are divided by it")
    args = parser.parse_args(argv)
    nvcc, folder = build.find_nvcc(), tools()
    if nvcc is None or folder is None:
        print(f"sass: {'nvcc' if nvcc is None else 'cuobjdump and nvdisasm'} not found", file=sys.stderr)
        return 2
    plain = re.split(r"[<(]", args.kernel)[0]  # a kernel's template arguments are not in its source
    holds = {room: any(plain in path.read_text() for path in room.glob("*.cu*")) for room in build.CSRC.iterdir()}
    sources = [path for path in sorted(build.CSRC.glob("*/*.cu")) if holds[path.parent]]
    found = False
    for cubin in (build.cubins(nvcc, [args.arch], sources) if sources else {}).values():
        listing = list(functions(disassemble(cubin, folder)))
        short = build.short_kernel_names([name for name, _ in listing]) if listing else {}
        for name, instructions in sorted(listing, key=lambda item: short[item[0]]):
            if args.kernel in short[name]:
                found = True
                print("\n".join(report(f"{short[name]}  sm_{args.arch}", counts(instructions), args.elements)))
    if not found:
        print(f"sass: no kernel has {args.kernel!r} in its name; csrc/nvcc_table.tsv lists them", file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
