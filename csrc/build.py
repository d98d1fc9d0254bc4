"""Builds everything native: which sources, which flags, which GPU images. Writes a build.ninja per target and runs ninja.

    python csrc/build.py ext          the torch extension cobra_kernels/_C.abi3.so, in place
    python csrc/build.py host         the module cobra_kernels_host: CPU kernels and emulated CUDA kernels, no torch
    python csrc/build.py asan|tsan    the same module under AddressSanitizer + UBSan, or ThreadSanitizer
    python csrc/build.py nvcc-check   every .cu for every GPU image; registers, shared memory and stack against nvcc_table.tsv

setup.py calls `build_extension` of this file; nothing else builds C++ or CUDA in this project. Objects live in one fixed
folder per target (build/<target>/), so a rebuild compiles what changed and nothing else. Rooms are found by file name:
<op>/<op>_cpu.cpp, <op>/<op>_cuda*.cu, <op>/<op>_binding.cpp, host/<op>_host.cpp.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EXTENSION = ROOT / "cobra_kernels" / "_C.abi3.so"

# One binary for torch 2.11 and every later one (LibTorch Stable ABI).
TORCH_TARGET_VERSION = "0x020b000000000000"

CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# No -ffast-math: it would fold the rounding steps of exp2 away and break NaN and infinity.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
KERNEL_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 warns inside its own AVX-512 header
LEVEL_FLAGS = {
    "scalar": ["-DCOBRA_LEVEL_SCALAR"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
LEVELS = list(LEVEL_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["scalar"]

NVCC_FLAGS = ["-O3", "-std=c++20", "--compress-mode=size", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
ALL_ARCHS = ["80", "86", "89", "90a", "100", "120"]  # sm_90a: plain sm_90 does not assemble wgmma
PTX_ARCH = "80"  # embedded as PTX, for every GPU without an image of its own


class BuildError(RuntimeError):
    """The build cannot start; the message says what is missing."""


class NoCompiler(BuildError):
    """There is no C++ compiler: the package works without its compiled kernels."""


# --- tools ---------------------------------------------------------------------------------------------------------


def find_cxx() -> str | None:
    """The C++ compiler: $CXX, else g++, else c++."""
    return shutil.which(os.environ.get("CXX") or "g++") or (None if os.environ.get("CXX") else shutil.which("c++"))


def find_nvcc() -> str | None:
    """nvcc, or None for a CPU-only build. COBRA_KERNELS_BUILD_CUDA=0 forces None, =1 makes its absence an error."""
    wanted = os.environ.get("COBRA_KERNELS_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"COBRA_KERNELS_BUILD_CUDA is {wanted!r}, expected 0 or 1")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise BuildError("COBRA_KERNELS_BUILD_CUDA=1 but nvcc is neither in $CUDA_HOME/bin nor on PATH")
    return nvcc


def cuda_root(nvcc: str) -> Path:
    """The toolkit's folder. nvcc says it itself: the one on PATH may be a wrapper that lives elsewhere."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True, check=False)
    for line in (dryrun.stdout + dryrun.stderr).splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return Path(nvcc).resolve().parents[1]


def find_ninja() -> list[str]:
    """ninja from PATH, else the one of the `ninja` Python package."""
    ninja = shutil.which("ninja")
    if ninja:
        return [ninja]
    try:
        import ninja as package
    except ImportError:
        raise BuildError("ninja not found: pip install ninja") from None
    return [str(Path(package.BIN_DIR) / "ninja")]


def cuda_archs() -> list[str]:
    """Architectures to build images for: TORCH_CUDA_ARCH_LIST, else the GPU present, else one Ampere and one Hopper."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if listed:
        archs = [a.removesuffix("+PTX").replace(".", "") for a in listed]
        return list(dict.fromkeys("90a" if a == "90" else a for a in archs))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        caps = sorted({line.strip().replace(".", "") for line in found.stdout.splitlines() if line.strip()})
        if found.returncode == 0 and caps:
            return ["90a" if c == "90" else c for c in caps]
    return ["80", "90a"]


def gencode(archs: list[str]) -> list[str]:
    """nvcc flags for the images of `archs` plus PTX for everything else."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return flags + [f"-gencode=arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}"]


# --- ninja ---------------------------------------------------------------------------------------------------------


class Ninja:
    """A build.ninja in build/<target>/, with one compile rule per tool, depfiles, and a link at the end."""

    def __init__(self, target: str) -> None:
        self.folder = ROOT / "build" / target
        self.lines = ["ninja_required_version = 1.3", f"builddir = {str(self.folder).replace('$', '$$')}", ""]
        self.rules: set[str] = set()

    def _rule(self, name: str, command: str, *, depfile: bool = True) -> None:
        if name in self.rules:
            return
        self.rules.add(name)
        self.lines += [f"rule {name}", f"  command = {command}", "  description = $what"]
        self.lines += ["  depfile = $out.d", "  deps = gcc", ""] if depfile else [""]

    @staticmethod
    def _path(path: Path) -> str:
        """A path in a build line. In commands ninja quotes $in and $out itself."""
        return re.sub(r"([$ :])", r"$\1", str(path))

    @staticmethod
    def _quote(words: list[str]) -> str:
        return " ".join(f"'{w}'" if any(c in w for c in " ();\"<>&") else w for w in words).replace("$", "$$")

    def compile(self, source: Path, tool: str, flags: list[str], suffix: str = "", keep_log: bool = False) -> Path:
        """One object. `suffix` tells apart several objects of one source; `x.cpp` and `x.cu` never share a name."""
        rule = "nvcc" if Path(tool).name.startswith("nvcc") else "cxx"
        command = f"{tool} $flags -MD -MF $out.d -c $in -o $out"
        if keep_log:
            rule, command = f"{rule}_log", f"{command} > $out.log 2>&1 || (cat $out.log && false)"
        self._rule(rule, command)
        relative = source.relative_to(CSRC)
        obj = self.folder / "obj" / relative.parent / f"{relative.name}{'.' + suffix if suffix else ''}.o"
        what = f"{relative} {suffix}".strip()
        self.lines += [f"build {self._path(obj)}: {rule} {self._path(source)}", f"  flags = {self._quote(flags)}", f"  what = {what}", ""]
        return obj

    def link(self, output: Path, tool: str, objects: list[Path], flags: list[str]) -> None:
        """A shared object from `objects`."""
        self._rule("link", f"{tool} -shared -o $out $in $flags", depfile=False)
        inputs = " ".join(self._path(o) for o in objects)
        self.lines += [f"build {self._path(output)}: link {inputs}", f"  flags = {self._quote(flags)}", f"  what = {output.name}", ""]

    def run(self) -> None:
        """Writes build.ninja and compile_commands.json, then builds with at most MAX_JOBS processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(self.lines)
        path = self.folder / "build.ninja"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        ninja = [*find_ninja(), "-f", str(path)]
        database = subprocess.run([*ninja, "-t", "compdb"], capture_output=True, text=True, check=False).stdout
        (self.folder / "compile_commands.json").write_text(database)
        jobs = os.environ.get("MAX_JOBS")
        with open(self.folder / ".lock", "w") as lock:  # two builds of one folder take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run([*ninja, *(["-j", jobs] if jobs else [])], check=True, cwd=ROOT)


# --- sources -------------------------------------------------------------------------------------------------------


def cpu_kernel_objects(
    ninja: Ninja, cxx: str, extra: list[str] | None = None, levels: list[str] | None = None, rooms: list[str] | None = None
) -> list[Path]:
    """The level switch, then <op>/<op>_cpu.cpp of every room, once per instruction-set level. No torch header, usable anywhere."""
    flags = [*CXX_FLAGS, f"-I{CSRC}"]
    objects = [ninja.compile(CSRC / "common" / "cpu_level.cpp", cxx, [*flags, *(extra or [])])]
    for source in sorted(CSRC.glob("*/*_cpu.cpp")):
        if rooms is not None and source.parent.name not in rooms:
            continue
        for level in levels or LEVELS:
            level_flags = [*KERNEL_FLAGS, f"-DCOBRA_LEVEL={level}", *LEVEL_FLAGS[level]]
            objects.append(ninja.compile(source, cxx, [*flags, *level_flags, *(extra or [])], suffix=level))
    return objects


def build_extension(output: Path = EXTENSION) -> str:
    """Builds the torch extension into `output` and returns one line that says what it holds."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    cxx, nvcc = find_cxx(), find_nvcc()
    if cxx is None:
        raise NoCompiler("no C++ compiler found (g++, c++ or $CXX)")
    torch_version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if torch_version < (2, 11):
        raise BuildError(f"torch {torch.__version__} found, 2.11 or later is needed")

    ninja = Ninja("ext")
    objects = cpu_kernel_objects(ninja, cxx)
    archs = cuda_archs() if nvcc else []
    images = " ".join([f"sm_{a}" for a in archs] + ([f"compute_{PTX_ARCH}"] if archs else []))
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DTORCH_STABLE_ONLY"]
    if nvcc:
        defines += ["-DCOBRA_WITH_CUDA", f"-DCOBRA_CUDA_IMAGES=\"{images}\""]
    binding_flags = [*CXX_FLAGS, *defines, f"-I{CSRC}", *(f"-isystem{p}" for p in include_paths())]
    if nvcc:
        binding_flags.append(f"-isystem{cuda_root(nvcc) / 'include'}")
    for source in sorted(CSRC.glob("*/*_binding.cpp")):
        objects.append(ninja.compile(source, cxx, binding_flags))
    if nvcc:
        for source in sorted(CSRC.glob("*/*_cuda*.cu")):
            objects.append(ninja.compile(source, nvcc, [*NVCC_FLAGS, *gencode(archs), f"-I{CSRC}"]))

    link = [*(f"-L{p}" for p in library_paths()), "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
    if nvcc:
        cuda_lib = cuda_root(nvcc) / "lib64"
        link += [f"-L{cuda_lib}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    link += ["-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-Wl,-s"]
    output.parent.mkdir(parents=True, exist_ok=True)
    ninja.link(output, cxx, objects, link)
    ninja.run()
    if nvcc:
        return f"cobra_kernels: built for CPU ({', '.join(LEVELS)}) and CUDA ({images})"
    why = "COBRA_KERNELS_BUILD_CUDA=0" if os.environ.get("COBRA_KERNELS_BUILD_CUDA") == "0" else "nvcc not found"
    return f"cobra_kernels: built for CPU ({', '.join(LEVELS)}) only; CUDA kernels left out: {why}"


# --- the host module ------------------------------------------------------------------------------------------------

HOST_FLAGS = {
    "host": [],
    "asan": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}


def host_module(target: str) -> Path:
    """Where `build_host(target)` puts the module."""
    return ROOT / "build" / target / f"cobra_kernels_host{sysconfig.get_config_var('EXT_SUFFIX')}"


def host_rooms() -> list[str]:
    """The rooms that have a host/<op>_host.cpp; the emulator's own probe is not one."""
    return [path.name.removesuffix("_host.cpp") for path in sorted(CSRC.glob("host/*_host.cpp")) if path.name != "probe_host.cpp"]


def host_glue_objects(cxx: str) -> list[Path]:
    """The pybind11 part, compiled once for all three builds: it holds no arithmetic, a sanitizer has nothing to see in it."""
    import pybind11

    python = sysconfig.get_path("include")
    if not (Path(python) / "Python.h").exists():
        raise BuildError(f"{python}/Python.h not found: install the headers of this Python (python3-dev)")
    ninja = Ninja("host-glue")
    flags = [*CXX_FLAGS, "-O1", f"-I{CSRC}", f"-isystem{python}", f"-isystem{pybind11.get_include()}"]
    objects = [ninja.compile(source, cxx, flags) for source in sorted(CSRC.glob("host/*.cpp"))]
    ninja.run()
    return objects


def emulated_flags(target: str) -> list[str]:
    """How the emulator (csrc/simt) compiles a .cu file."""
    return ["-x", "c++", *CXX_FLAGS, "-O1", "-Wno-unknown-pragmas", f"-I{CSRC}", *HOST_FLAGS[target]]


def emulated_objects(cxx: str, target: str, rooms: list[str] | None = None) -> list[Path]:
    """The .cu files of these rooms (default: all of the host module), and the probe's, as C++."""
    ninja = Ninja("-".join([target, "emulated", *(rooms or [])]))
    sources = [path for room in rooms or host_rooms() for path in sorted(CSRC.glob(f"{room}/*_cuda*.cu"))]
    objects = [ninja.compile(source, cxx, emulated_flags(target)) for source in [*sources, CSRC / "simt" / "probe.cu"]]
    ninja.run()
    return objects


def runnable_levels() -> list[str]:
    """The instruction-set levels that this processor can run."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return [level for level in LEVELS if level == "scalar" or {"avx2": "avx2", "avx512": "avx512vl"}[level] in words]


def host_cpu_objects(cxx: str, target: str) -> list[Path]:
    """The CPU kernels of the host module's rooms. A level that cannot run here is not on trial: no sanitizer, to save time."""
    levels = LEVELS if target == "host" else runnable_levels()
    rest = [level for level in LEVELS if level not in levels]
    ninja = Ninja(f"{target}-cpu")
    objects = cpu_kernel_objects(ninja, cxx, HOST_FLAGS[target], levels, host_rooms())
    if rest:
        objects += cpu_kernel_objects(ninja, cxx, ["-O0"], rest, host_rooms())[1:]
    ninja.run()
    return objects


def build_host(target: str) -> str:
    """Builds cobra_kernels_host plain ("host") or under a sanitizer ("asan", "tsan")."""
    cxx = find_cxx()
    if cxx is None:
        raise NoCompiler("no C++ compiler found (g++, c++ or $CXX)")
    objects = [*host_glue_objects(cxx), *emulated_objects(cxx, target), *host_cpu_objects(cxx, target)]
    ninja = Ninja(target)
    ninja.link(host_module(target), cxx, objects, [*HOST_FLAGS[target], "-lpthread"])
    ninja.run()
    return f"cobra_kernels_host: {host_module(target).relative_to(ROOT)}"


# --- nvcc-check -----------------------------------------------------------------------------------------------------

TABLE = CSRC / "nvcc_table.tsv"
HOW_TO_UPDATE = "make nvcc-check UPDATE=1 writes the new table; commit it with the change"


def read_ptxas_log(text: str) -> dict[str, dict[str, int]]:
    """Mangled kernel name -> registers, shared, stack, spills (bytes), from the output of `ptxas -v`."""
    kernels: dict[str, dict[str, int]] = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.split("'", 1)[0]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        if frame is None or used is None:
            raise BuildError(f"nvcc-check: ptxas printed no figures for {name}")
        shared = re.search(r"(\d+) bytes smem", used[2])
        stack, stores, loads = map(int, frame.groups())
        registers = int(used[1])
        kernels[name] = {"registers": registers, "shared": int(shared[1]) if shared else 0, "stack": stack, "spills": stores + loads}
    return kernels


def short_kernel_names(mangled: list[str]) -> dict[str, str]:
    """Readable kernel names, without namespaces and arguments."""
    found = subprocess.run(["c++filt", "-p", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    drop = re.compile(r"\(anonymous namespace\)::|cobra::|void |\((?:int|bool)\)")
    return {name: drop.sub("", readable) for name, readable in zip(mangled, found)}


def nvcc_version(nvcc: str) -> str:
    """Such as "13.0.88": registers are compared only between equal compilers."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text)[1]


# (source, kernel) -> architecture -> registers, shared, stack, spills
Figures = dict[tuple[str, str], dict[str, dict[str, int]]]
COLUMNS = ("registers", "shared", "stack")


def cubins(nvcc: str, archs: list[str], sources: list[Path]) -> dict[tuple[Path, str], Path]:
    """Every source for every architecture, machine code only; beside each x.o lies x.o.log, what ptxas said of it."""
    ninja = Ninja("nvcc-check")
    objects = {}
    for source in sources:
        for arch in archs:
            flags = [*NVCC_FLAGS, "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", f"-I{CSRC}"]
            objects[source, arch] = ninja.compile(source, nvcc, flags, suffix=f"sm_{arch}", keep_log=True)
    ninja.run()
    return objects


def measure_kernels(nvcc: str, archs: list[str], room: str = "*") -> Figures:
    """Compiles what changed and reads the figures of every kernel, or of one room's."""
    sources = sorted(CSRC.glob(f"{room}/*.cu"))
    objects = cubins(nvcc, archs, sources)
    figures: Figures = {}
    for source in sources:
        per_arch = {arch: read_ptxas_log(Path(f"{objects[source, arch]}.log").read_text()) for arch in archs}
        names = sorted({name for kernels in per_arch.values() for name in kernels})
        if not names:
            raise BuildError(f"nvcc-check: {source.relative_to(ROOT)} has no kernel")
        relative = str(source.relative_to(CSRC))
        for name, short in short_kernel_names(names).items():
            figures[relative, short] = {arch: per_arch[arch][name] for arch in archs if name in per_arch[arch]}
    return figures


def write_table(figures: Figures, version: str, path: Path) -> None:
    """One line per kernel; a cell is registers/shared/stack, "-" where the image has no such kernel."""
    lines = [f"# nvcc {version}; cells: registers per thread / bytes of static shared memory / bytes of stack. {HOW_TO_UPDATE}."]
    lines.append("\t".join(["source", "kernel", *(f"sm_{arch}" for arch in ALL_ARCHS)]))
    for (source, kernel), per_arch in sorted(figures.items()):
        cells = ("/".join(str(per_arch[arch][key]) for key in COLUMNS) if arch in per_arch else "-" for arch in ALL_ARCHS)
        lines.append("\t".join([source, kernel, *cells]))
    path.write_text("\n".join(lines) + "\n")


def read_table(path: Path) -> tuple[str, Figures]:
    """(nvcc version, figures) of a committed table; no version and no figures when there is none."""
    if not path.exists():
        return "", {}
    first, heads, *lines = path.read_text().splitlines()
    version = re.match(r"# nvcc ([\d.]+);", first)
    archs = [head.removeprefix("sm_") for head in heads.split("\t")[2:]]
    figures: Figures = {}
    for line in lines:
        source, kernel, *cells = line.split("\t")
        values = {arch: map(int, cell.split("/")) for arch, cell in zip(archs, cells, strict=True) if cell != "-"}
        figures[source, kernel] = {arch: dict(zip(COLUMNS, numbers, strict=True)) for arch, numbers in values.items()}
    return version[1] if version else "", figures


def compare_figures(now: Figures, committed: Figures, archs: list[str], same_compiler: bool = True) -> tuple[list[str], list[str]]:
    """(failures, remarks). Spills always fail. More registers, shared memory or stack than committed fail under the same
    compiler and are remarks under another; kernels that are not in the table, or only there, fail."""
    failures, remarks = [], []
    for key in sorted(now.keys() | committed.keys()):
        label = f"{key[0]}: {key[1]}"
        if key not in now:
            failures.append(f"{label} is in the table but no longer in the source")
            continue
        for arch, figures in now[key].items():
            if figures["spills"]:
                failures.append(f"{label} spills {figures['spills']} bytes (sm_{arch})")
        if key not in committed:
            failures.append(f"{label} is not in the table")
            continue
        for arch in archs:
            new, old = now[key].get(arch), committed[key].get(arch)
            if new is None or old is None:
                if new is not old:
                    failures.append(f"{label} is {'not' if old is None else 'only'} in the table for sm_{arch}")
                continue
            for what in COLUMNS:
                if new[what] > old[what]:
                    (failures if same_compiler else remarks).append(f"{label} (sm_{arch}): {what} {old[what]} -> {new[what]}")
                elif new[what] < old[what]:
                    remarks.append(f"{label} (sm_{arch}): {what} {old[what]} -> {new[what]}, fewer than in the table")
    return failures, remarks


def print_figures(figures: Figures, archs: list[str]) -> None:
    print(f"{'registers per thread':<58} " + " ".join(f"{'sm_' + a:>6}" for a in archs) + "  shared  stack  spills  (bytes, worst image)")
    previous = None
    for (source, kernel), per_arch in sorted(figures.items()):
        if source != previous:
            print(source)
            previous = source
        worst = {key: max(image[key] for image in per_arch.values()) for key in ("shared", "stack", "spills")}
        registers = " ".join(f"{per_arch[arch]['registers'] if arch in per_arch else '-':>6}" for arch in archs)
        print(f"  {kernel:<56} {registers}  {worst['shared']:>6}  {worst['stack']:>5}  {worst['spills']:>6}")


def nvcc_check() -> str:
    """Compiles every .cu for every architecture and compares with the committed table. $ARCHS and $ROOM narrow it, UPDATE=1 writes
    the table (of that room)."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc-check: nvcc not found in $CUDA_HOME/bin or on PATH")
    archs = os.environ.get("ARCHS", "").split() or ALL_ARCHS
    room = os.environ.get("ROOM") or "*"
    if room != "*" and not any(CSRC.glob(f"{room}/*.cu")):
        raise BuildError(f"nvcc-check: ROOM is {room}, which has no .cu file")
    unknown = [arch for arch in archs if arch not in ALL_ARCHS]
    update = os.environ.get("UPDATE") == "1"
    if unknown or update and archs != ALL_ARCHS:
        raise BuildError(f"nvcc-check: ARCHS is {' '.join(archs)}, expected some of {' '.join(ALL_ARCHS)} (and all of them with UPDATE=1)")
    start = time.monotonic()
    figures, version = measure_kernels(nvcc, archs, room), nvcc_version(nvcc)
    print_figures(figures, archs)
    table_version, table = read_table(TABLE)
    others = {key: value for key, value in table.items() if room not in ("*", key[0].split("/")[0])}
    committed = {key: value for key, value in table.items() if key not in others}
    if update:
        table_version, committed = version, figures
    failures, remarks = compare_figures(figures, committed, archs, version == table_version)
    if version != table_version:
        print(f"nvcc {version} here, {table_version or 'none'} in {TABLE.name}: only spills and missing kernels fail")
    for remark in remarks:
        print(f"  {remark}")
    if failures:
        raise BuildError("nvcc-check:\n  " + "\n  ".join(failures) + f"\n{HOW_TO_UPDATE}")
    if update:
        write_table({**others, **figures}, version, TABLE)
    seconds = time.monotonic() - start
    return f"nvcc-check: {len(figures)} kernels x {len(archs)} images, no spill, as in {TABLE.relative_to(ROOT)}, {seconds:.0f} s"


TARGETS = {
    "ext": build_extension,
    "host": lambda: build_host("host"),
    "asan": lambda: build_host("asan"),
    "tsan": lambda: build_host("tsan"),
    "nvcc-check": nvcc_check,
}


def main(argv: list[str] | None = None) -> int:
    """Builds the targets named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="+", choices=sorted(TARGETS))
    for target in parser.parse_args(argv).target:
        try:
            message = TARGETS[target]()
        except BuildError as error:
            print(f"build: {error}", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError as error:
            return error.returncode
        if message:
            print(message)
    return 0


if __name__ == "__main__":
    sys.exit(main())
