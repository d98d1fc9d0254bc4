"""`python -m cobra_kernels.doctor`: a diagnosis to paste into an issue. Exit status 0 when the device's default backend works."""

from __future__ import annotations

import os
import platform
import sys

import torch

from . import __version__, dispatch, extension, ops

FLOORS = {"python": "3.10", "torch": "2.11", "glibc": "2.28", "NVIDIA driver (CUDA 13 images)": "580"}
ENVIRONMENT = (
    "COBRA_KERNELS_BACKEND",
    "COBRA_KERNELS_STRICT",
    "COBRA_KERNELS_CPU_LEVEL",
    "COBRA_KERNELS_CHECK",
    "COBRA_KERNELS_BUILD_CUDA",
    "TORCH_CUDA_ARCH_LIST",
)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


def report() -> str:
    """The diagnosis as text: versions, devices, backends with reasons, ops with the backend each would use."""
    lines = [f"cobra_kernels {__version__}", ""]
    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {'-'.join(platform.libc_ver())}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": _version("triton"),
        "GPU": _gpu(),
        "threads": str(torch.get_num_threads()),
        "extension": str(extension.PATH) if extension.absence() is None else f"absent: {extension.absence()}",
        "CPU level": f"{extension.cpu_level()} (best here: {extension.best_cpu_level()})",
        "CUDA images": " ".join(extension.cuda_images()) or "none (CPU-only build)",
        "floors": ", ".join(f"{k} >= {v}" for k, v in FLOORS.items()),
    }
    lines += [f"{name:12} {value}" for name, value in facts.items()]
    lines += ["", "environment"]
    lines += [f"  {name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ] or ["  (none of ours set)"]
    lines += ["", "backends"]
    lines += [f"  {name:10} {'yes' if reason is None else 'no: ' + reason}" for name, reason in dispatch.backends().items()]
    lines += ["", f"ops on {_device()} tensors"]
    probe = torch.empty(0, device=_device())
    for name, (_, table) in sorted(ops.PLANS.items()):
        try:
            lines.append(f"  {name:24} {dispatch.select(name, table, None, probe)}")
        except Exception as error:  # a diagnosis reports every failure
            lines.append(f"  {name:24} {error}")
    return "\n".join(lines)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    """Prints the report."""
    print(report())
    wanted = dispatch.DEFAULTS[_device()][0]
    reason = dispatch.backends()[wanted]
    print()
    if reason is None:
        print(f"ok: {wanted!r} is the default backend here. `python -c 'import cobra_kernels; cobra_kernels.selftest()'` compares it with fp64.")
        return 0
    print(f"not ok: the default backend {wanted!r} is unavailable: {reason}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
