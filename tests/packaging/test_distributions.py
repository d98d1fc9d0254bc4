"""The wheel and the sdist, each in an empty environment, pass tests from outside the tree; so do builds with tools hidden."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs from a source tree only"),
    pytest.mark.timeout(1200),  # a cold build of every kernel
]


def run(*command, cwd, check=True, **environment) -> str:
    """Output of a command; a value of None removes the variable."""
    env = {k: v for k, v in {**os.environ, "MAX_JOBS": "2", **environment}.items() if v is not None}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def copy_of_tree(folder: Path) -> Path:
    """Sources only: no build folder, no environment, no shared object."""
    ignore = shutil.ignore_patterns(".git", ".venv*", "build", "out", "dist", "__pycache__", "*.so", "*.egg-info", "results")
    return Path(shutil.copytree(ROOT, folder / "tree", ignore=ignore))


def empty_environment(folder: Path) -> Path:
    """A new venv that sees this environment's packages but, as .pth files there are not read, not this project."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "packages.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return python


def install(python: Path, wheel: Path) -> Path:
    """Installs a wheel without dependencies; returns site-packages."""
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=wheel.parent).strip())
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=wheel.parent)
    return site


def wheel_of(tree: Path, folder: Path, **environment) -> tuple[Path, str]:
    """Builds a wheel of `tree`; returns it and the build's output."""
    output = run(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, tree, cwd=folder, **environment)
    (wheel,) = folder.glob("cobra_kernels-*.whl")
    return wheel, output


CHECK = """
import cobra_kernels, torch, sys
from cobra_kernels import rms_norm
assert {tree!r} not in cobra_kernels.__file__, cobra_kernels.__file__
y = rms_norm(torch.randn(3, 40), torch.ones(40))
print("backends", cobra_kernels.backends())
print("ran", cobra_kernels.call_counts())

import cobra_kernels.compat, importlib.metadata
cobra_kernels.compat.install()
import causal_conv1d, mamba_ssm
assert {tree!r} not in mamba_ssm.__file__ and importlib.metadata.version("mamba_ssm") == mamba_ssm.__version__
"""


def tools_without(folder: Path, *hidden: str) -> str:
    """A PATH of links to every tool except the hidden ones."""
    tools = folder / "tools"
    tools.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for tool in Path(directory).glob("*") if Path(directory).is_dir() else ():
            if tool.name not in hidden and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    return str(tools)


def test_wheel_and_sdist_pass_tests_from_outside_the_tree(tmp_path):
    tree = copy_of_tree(tmp_path)
    run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(tmp_path)!r})", cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
        archive.extractall(tmp_path / "an sdist", filter="data")  # a path with a space, through every tool of the build
    sources = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".py"}}
    assert sources <= names, f"missing from the sdist: {sorted(sources - names)[:10]}"
    (unpacked,) = (tmp_path / "an sdist").iterdir()

    wheel, output = wheel_of(unpacked, tmp_path, COBRA_KERNELS_BUILD_CUDA="0")  # the wheel of the sdist: both at once
    assert "abi3" in wheel.name and "CUDA kernels left out: COBRA_KERNELS_BUILD_CUDA=0" in output
    with zipfile.ZipFile(wheel) as archive:
        packages = {n.split("/")[0] for n in archive.namelist() if not n.split("/")[0].endswith(".dist-info")}
    assert packages == {"cobra_kernels"}, "the kernels' wheel holds the kernels' package and nothing else"

    python = empty_environment(tmp_path)
    install(python, wheel)
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copytree(ROOT / "tests", outside / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    assert "('rms_norm', 'cpu'): 1" in run(python, "-c", CHECK.format(tree=str(ROOT)), cwd=outside)
    rooms = sorted((outside / "tests" / "ops").glob("test_*.py"))
    run(python, "-m", "pytest", "-q", "-x", "-n", "2", "-m", "not threads", "-o", "markers=threads\ngpu", "-k", "errors or closed or supports", *rooms,
        cwd=outside, PYTHONPATH=str(outside), COBRA_KERNELS_STRICT="1", OMP_NUM_THREADS="1")  # fmt: skip


def test_kernels_wheel_beside_a_foreign_package_named_cobra(tmp_path):
    """`cobra` on the package index is another project: installing our kernels must not touch it."""
    wheel, _ = wheel_of(copy_of_tree(tmp_path), tmp_path, PATH=tools_without(tmp_path, "g++", "c++"), CXX=None)
    python = empty_environment(tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "cobra").mkdir()
    foreign = site / "cobra" / "__init__.py"
    foreign.write_text("metabolic = True\n")
    install(python, wheel)
    check = "import cobra, cobra_kernels, torch; assert cobra.metabolic; cobra_kernels.rms_norm(torch.ones(1, 4), torch.ones(4)); print('both')"
    assert "both" in run(python, "-c", check, cwd=tmp_path)
    assert foreign.read_text() == "metabolic = True\n"


def test_without_a_compiler_the_package_still_runs_and_says_so(tmp_path):
    path = tools_without(tmp_path, "g++", "c++", "gcc", "cc", "clang++", "nvcc")
    wheel, output = wheel_of(copy_of_tree(tmp_path), tmp_path, PATH=path, CXX=None, CUDA_HOME=None)
    assert "compiled kernels left out: no C++ compiler found" in output
    python = empty_environment(tmp_path)
    install(python, wheel)
    said = run(python, "-W", "always", "-c", CHECK.format(tree=str(ROOT)), cwd=tmp_path)
    assert "('rms_norm', 'reference'): 1" in said and "no C++ compiler at build time" in said and "runs on 'reference'" in said
    strict = run(python, "-c", CHECK.format(tree=str(ROOT)), cwd=tmp_path, check=False, COBRA_KERNELS_STRICT="1")
    assert "BackendUnavailable" in strict and "COBRA_KERNELS_STRICT=1 forbids" in strict


def test_without_ninja_the_build_fails_and_says_what_to_install(tmp_path):
    """A compiler without ninja is an oversight: left out in silence, every call would run on the slow path."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "ninja.py").write_text("raise ImportError\n")
    path = tools_without(tmp_path, "ninja", "nvcc")
    said = run(sys.executable, "setup.py", "-q", "build_ext", cwd=copy_of_tree(tmp_path), check=False, PATH=path, CUDA_HOME=None,
               PYTHONPATH=str(tmp_path / "hidden"))  # fmt: skip
    assert "BuildError: ninja not found: pip install ninja" in said, said[-2000:]


def test_without_nvcc_the_build_is_cpu_only_and_says_so(tmp_path):
    path = tools_without(tmp_path, "nvcc")
    code = "import importlib.util as u; s = u.spec_from_file_location('b', 'csrc/build.py'); b = u.module_from_spec(s); s.loader.exec_module(b); print(b.find_nvcc())"
    assert run(sys.executable, "-c", code, cwd=ROOT, PATH=path, CUDA_HOME=None, COBRA_KERNELS_BUILD_CUDA=None).strip() == "None"
    forced = run(sys.executable, "-c", code, cwd=ROOT, PATH=path, CUDA_HOME=None, COBRA_KERNELS_BUILD_CUDA="1", check=False)
    assert "COBRA_KERNELS_BUILD_CUDA=1 but nvcc is neither" in forced
    wrong = run(sys.executable, "-c", code, cwd=ROOT, COBRA_KERNELS_BUILD_CUDA="yes", check=False)
    assert "expected 0 or 1" in wrong


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_undefined_symbols_are_the_stable_shim():
    """Nothing of torch is used but its C shim, so one binary serves torch 2.11 and later; nothing of Python, so any Python."""
    shared = ROOT / "cobra_kernels" / "_C.abi3.so"
    if not shared.exists():
        pytest.skip("no compiled kernels in this tree")
    undefined = [line.split()[-1].split("@")[0] for line in run("nm", "-D", "--undefined-only", shared, cwd=ROOT).splitlines()]
    headers = Path(torch.__file__).parent / "include" / "torch"
    shim = "".join(p.read_text(errors="ignore") for folder in ("csrc/inductor/aoti_torch", "csrc/stable") for p in (headers / folder).rglob("*.h"))
    assert not [s for s in undefined if s.startswith(("Py", "_Py"))]
    assert not [s for s in undefined if s.startswith("_ZN") and any(t in s for t in ("2at", "3c10", "5torch"))]
    ours = [s for s in undefined if s.startswith(("aoti_torch_", "torch_"))]
    assert ours and not [s for s in ours if s not in shim]
