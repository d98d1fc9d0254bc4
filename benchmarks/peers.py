"""Other people's CUDA kernels of the same ops, as providers of the benches: mamba-ssm and causal-conv1d.

An installed package is used as it is. Otherwise COBRA_BENCH_PEERS names a folder with their sdists; `python -m benchmarks.peers
build FOLDER` compiles, for the GPU present, the sources that the benches call (selective scan forward, convolution forward and
update) with the flags of their own setup.py, unchanged. Their Python files are imported from the unpacked sdist, without the
packages' `__init__`, which would pull in models. What is absent is left out with one line."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.environment import ROOT
from benchmarks.harness.timing import Provider

BUILD = ROOT / "build" / "peers"
# Of both packages' setup.py, but for the list of architectures.
NVCC_FLAGS = [
    "-O3", "-std=c++17", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__", "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
    "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "-Xcompiler", "-fPIC",
]  # fmt: skip
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-w"]


@dataclass(frozen=True)
class Peer:
    """One package: its sdist, the extension module its Python calls, and the sources of that module which the benches reach."""

    package: str
    version: str
    module: str
    sources: tuple[str, ...]

    def sdist(self, folder: Path) -> Path | None:
        return next(iter(sorted(folder.glob(f"{self.package}-{self.version}.tar.gz"))), None)

    @property
    def unpacked(self) -> Path:
        return BUILD / f"{self.package}-{self.version}"

    @property
    def library(self) -> Path:
        return self.unpacked / f"{self.module}{sysconfig.get_config_var('EXT_SUFFIX')}"


PEERS = {
    "mamba_ssm": Peer(
        "mamba_ssm", "2.3.2.post1", "selective_scan_cuda",
        tuple(f"csrc/selective_scan/selective_scan{part}" for part in (".cpp", "_fwd_bf16.cu", "_fwd_fp16.cu", "_fwd_fp32.cu")),
    ),
    "causal_conv1d": Peer(
        "causal_conv1d", "1.7.0", "causal_conv1d_cuda",
        tuple(f"csrc/causal_conv1d{part}" for part in (".cpp", "_fwd.cu", "_update.cu")),
    ),
}  # fmt: skip


# --- building ------------------------------------------------------------------------------------------------------------


def compile_commands(peer: Peer, architecture: str, nvcc: str, cxx: str) -> tuple[list[list[str]], list[str]]:
    """(one command per source, the link command). The backward kernels are not compiled: their symbols stay open, and the
    module is linked and loaded lazily, so that only a call of a backward would miss them."""
    from torch.utils.cpp_extension import include_paths, library_paths

    toolkit = Path(nvcc).resolve().parents[1]
    includes = [word for path in (*include_paths(), sysconfig.get_path("include"), toolkit / "include") for word in ("-isystem", str(path))]
    shared = [*includes, f"-DTORCH_EXTENSION_NAME={peer.module}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    commands, objects = [], []
    for source in peer.sources:
        output = peer.unpacked / f"{Path(source).name}.o"
        objects.append(str(output))
        tool = [nvcc, *NVCC_FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}"] if source.endswith(".cu") else [cxx, *CXX_FLAGS]
        commands.append([*tool, *shared, "-c", str(peer.unpacked / source), "-o", str(output)])
    libraries = ["-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda", "-ltorch", "-ltorch_python", "-lcudart"]
    folders = [f"-L{path}" for path in (*library_paths(), toolkit / "lib64")]
    link = [cxx, "-shared", "-Wl,-z,lazy", "-Wl,--no-as-needed", "-o", str(peer.library), *objects, *folders, *libraries]
    return commands, link


def unpack(peer: Peer, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(BUILD, filter="data")
    if not (peer.unpacked / peer.sources[0]).exists():
        raise RuntimeError(f"{sdist.name} does not hold {peer.sources[0]}")


def build(folder: Path, architecture: str) -> list[str]:
    """Builds every peer whose sdist is in the folder, all sources at once; returns one line per peer."""
    csrc = str(ROOT / "csrc")
    sys.path.insert(0, csrc)
    import build as ours

    nvcc, cxx = ours.find_nvcc(), ours.find_cxx()
    if nvcc is None or cxx is None:
        return [f"peers: no {'nvcc' if nvcc is None else 'C++ compiler'}"]
    nvcc = str(ours.cuda_root(nvcc) / "bin" / "nvcc")
    BUILD.mkdir(parents=True, exist_ok=True)
    lines, links, jobs = [], {}, []
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 2)) as pool:
        for peer in PEERS.values():
            sdist = peer.sdist(folder)
            if sdist is None:
                lines.append(f"left out: {peer.package} {peer.version}: no sdist in {folder}")
            elif peer.library.exists() and (peer.unpacked / "architecture").read_text() == architecture:
                lines.append(f"{peer.package} {peer.version}: built before")
            else:
                unpack(peer, sdist)
                commands, links[peer] = compile_commands(peer, architecture, nvcc, cxx)
                jobs += [(peer, pool.submit(run, command)) for command in commands]
        errors = {peer: error for peer, job in jobs if (error := job.result())}
    for peer, link in links.items():
        error = errors.get(peer) or run(link)
        if not error:
            (peer.unpacked / "architecture").write_text(architecture)
        lines.append(f"{peer.package} {peer.version}: " + (f"does not build: {error}" if error else f"built for sm_{architecture}"))
    return lines


def run(command: list[str]) -> str:
    """The last lines of a failed command's output; empty when it succeeded."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])


# --- importing -----------------------------------------------------------------------------------------------------------


def load_library(peer: Peer) -> types.ModuleType:
    """The compiled module, with symbols resolved when they are first called."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
    try:
        spec = importlib.util.spec_from_file_location(peer.module, peer.library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
    return module


@functools.cache
def find(package: str) -> str | None:
    """Makes `package.*` importable; returns why it cannot be."""
    peer = PEERS[package]
    if importlib.util.find_spec(package) is not None and importlib.util.find_spec(peer.module) is not None:
        return None
    if not os.environ.get("COBRA_BENCH_PEERS"):
        return "not installed, and COBRA_BENCH_PEERS names no folder of sdists"
    if not peer.library.exists():
        return f"not built: python -m benchmarks.peers build {os.environ['COBRA_BENCH_PEERS']}"
    try:
        sys.modules[peer.module] = load_library(peer)
    except ImportError as error:
        return f"its extension does not load: {error}"
    bare = types.ModuleType(package)
    bare.__path__ = [str(peer.unpacked / package)]
    sys.modules[package] = bare
    return None


def function(package: str, module: str, name: str) -> Callable | None:
    """package.module.name, or None after one line that says why not."""
    reason = find(package)
    if reason is None:
        try:
            return getattr(importlib.import_module(f"{package}.{module}"), name)
        except (ImportError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
    _say(f"left out: {package}: {reason}")
    return None


@functools.cache
def _say(line: str) -> None:
    print(line)


# --- providers -----------------------------------------------------------------------------------------------------------


def provider(name: str, call: Callable, needs: tuple[str, str, str], make_inputs: Callable | None = None) -> list[Provider]:
    """[Provider] of call(upstream function, *inputs), or [] when the peer is not there."""
    upstream = function(*needs)
    return [Provider(name, functools.partial(call, upstream), make_inputs)] if upstream else []


def selective_scan(make_inputs: Callable[[int], tuple]) -> list[Provider]:
    """In the layout that its kernel reads: channel-first, B and C contiguous; making it so is not timed."""

    def inputs(index: int) -> tuple:
        return tuple(t.contiguous() for t in make_inputs(index))

    def call(scan, u, delta, A, B, C, D, z, delta_bias):
        return scan(u, delta, A, B, C, D, z, delta_bias, True, True)

    return provider("mamba-ssm", call, ("mamba_ssm", "ops.selective_scan_interface", "selective_scan_fn"), inputs)


def causal_conv1d(width: int) -> list[Provider]:
    """With the final states copied, as its callers do: the kernel gives them for one layout only."""

    def call(conv, x, weight, bias):
        return conv(x, weight, bias, activation="silu"), x[..., -(width - 1) :].clone()

    return provider("causal-conv1d", call, ("causal_conv1d", "causal_conv1d_interface", "causal_conv1d_fn"))


def causal_conv1d_update() -> list[Provider]:
    def call(update, x, state, weight, bias):
        return update(x, state, weight, bias, "silu")

    return provider("causal-conv1d", call, ("causal_conv1d", "causal_conv1d_interface", "causal_conv1d_update"))


def selective_state_update() -> list[Provider]:
    def call(update, *tensors):
        return update(*tensors, dt_softplus=True)

    return provider("mamba-ssm", call, ("mamba_ssm", "ops.triton.selective_state_update", "selective_state_update"))


def rms_norm(eps: float) -> list[Provider]:
    def call(norm, x, weight, residual, dy=None, ds=None):
        y, s = norm(x, weight, None, residual, eps=eps, prenorm=True, residual_in_fp32=True)
        return (y, s) if dy is None else torch.autograd.grad((y, s), (x, weight, residual), (dy, ds))

    return provider("mamba-ssm", call, ("mamba_ssm", "ops.triton.layer_norm", "rms_norm_fn"))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    p.add_argument("verb", choices=("build", "clean"))
    p.add_argument("folder", nargs="?", type=Path, help="of build: where the sdists are")
    p.add_argument("--arch", help="such as 90 (default: of the GPU present)")
    args = p.parse_args(argv)
    if args.verb == "clean":
        shutil.rmtree(BUILD, ignore_errors=True)
        return 0
    if args.folder is None or not args.folder.is_dir():
        p.error(f"build: {args.folder} is no folder")
    if args.arch is None and not torch.cuda.is_available():
        p.error("build: torch sees no CUDA device; say --arch")
    architecture = args.arch or "".join(map(str, torch.cuda.get_device_capability()))
    lines = build(args.folder, architecture)
    print("\n".join(lines))
    return 1 if any("does not build" in line for line in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
