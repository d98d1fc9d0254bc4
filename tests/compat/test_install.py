"""install() and uninstall(): what they put where, what they leave alone, and code that is run under them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import cobra_kernels
from cobra_kernels import compat
from cobra_kernels.compat.install import NAMES, SHIMS

MODULES = """
mamba_ssm mamba_ssm.ops mamba_ssm.ops.selective_scan_interface mamba_ssm.ops.triton mamba_ssm.ops.triton.selective_state_update
mamba_ssm.ops.triton.layernorm mamba_ssm.ops.triton.layer_norm mamba_ssm.ops.triton.ssd_combined mamba_ssm.ops.triton.layernorm_gated
mamba_ssm.modules mamba_ssm.modules.mamba_simple mamba_ssm.modules.block mamba_ssm.modules.mamba2 mamba_ssm.modules.mamba3
mamba_ssm.models mamba_ssm.models.mixer_seq_simple mamba_ssm.models.config_mamba mamba_ssm.utils mamba_ssm.utils.generation
mamba_ssm.utils.hf mamba_ssm.utils.torch mamba_ssm.distributed.tensor_parallel mamba_ssm.modules.ssd_minimal selective_scan_cuda
selective_scan_cuda_core selective_scan_cuda_oflex causal_conv1d causal_conv1d.causal_conv1d_interface causal_conv1d.causal_conv1d_varlen
causal_conv1d.cpp_functions causal_conv1d_cuda
""".split()


def state():
    names = [name for name in sys.modules if name.split(".")[0] in NAMES]
    return list(sys.path), os.environ.get("PYTHONPATH"), {name: sys.modules[name] for name in names}


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = state()
    yield
    compat.uninstall()
    assert state() == before


def run(code: str, *arguments: str, cwd=None) -> str:
    """Standard output of a fresh interpreter; `-m` and scripts through `arguments`."""
    done = subprocess.run([sys.executable, *(arguments or ("-c", code))], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_real(name, shims):
    module = importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    assert module.__spec__.name == name and Path(spec.origin) == Path(module.__file__)
    assert Path(module.__file__).is_relative_to(SHIMS)


def test_what_it_finds_is_left_alone(tmp_path, monkeypatch):
    """A package that is really installed stays, unless forced; uninstall() brings its modules back."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("__version__ = 'real'")
    monkeypatch.syspath_prepend(str(tmp_path))
    real = importlib.import_module("mamba_ssm")
    found = compat.install()
    assert "the installed package" in found["mamba_ssm"] and "cobra_kernels" in found["causal_conv1d"]
    assert set(compat.installed()) == set(NAMES) - {"mamba_ssm"}
    assert importlib.import_module("mamba_ssm") is real
    assert importlib.import_module("causal_conv1d").__version__.endswith("+cobra")

    forced = compat.install(force=True)
    assert "in place of" in forced["mamba_ssm"] and str(tmp_path) in forced["mamba_ssm"]
    assert importlib.import_module("mamba_ssm").__version__.endswith("+cobra")
    compat.uninstall()
    assert importlib.import_module("mamba_ssm") is real
    for name in ("mamba_ssm",):
        del sys.modules[name]


def test_raw_modules_are_there_for_a_fork_without_them(tmp_path, monkeypatch):
    """Vim's own mamba_ssm, or mamba_ssm 2.3.2 as it installs by default: Python files that import a selective_scan_cuda they lack."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(
        "import selective_scan_cuda, causal_conv1d_cuda\nfrom causal_conv1d import causal_conv1d_fn"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(tmp_path) in compat.install()["mamba_ssm"]
    fork = importlib.import_module("mamba_ssm")
    assert Path(fork.__file__).is_relative_to(tmp_path) and Path(fork.selective_scan_cuda.__file__).is_relative_to(SHIMS)
    del sys.modules["mamba_ssm"]


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    """Python run in a checkout of causal-conv1d, or in a folder with kernels of that name."""
    (tmp_path / "causal_conv1d").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)  # what an earlier test left is put back afterwards
    for imported in (False, True):  # a `try: import causal_conv1d` before install() leaves such a folder in sys.modules
        if imported:
            assert not hasattr(importlib.import_module("causal_conv1d"), "__version__")
        assert "cobra_kernels" in compat.install()["causal_conv1d"]
        assert importlib.import_module("causal_conv1d").__version__.endswith("+cobra")
        compat.uninstall()
    del sys.modules["causal_conv1d"]


def test_again_changes_nothing():
    first = compat.install()
    path = list(sys.path)
    module = importlib.import_module("mamba_ssm")
    second = compat.install()
    assert sys.path == path and importlib.import_module("mamba_ssm") is module
    assert first.keys() == second.keys() == set(NAMES)


def test_from_many_threads():
    """Each thread can import as soon as its own call returns."""
    found = []

    def work():
        compat.install()
        found.append(importlib.import_module("mamba_ssm"))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len(set(map(id, found))) == 1
    assert [entry for entry in sys.path if "shims" in entry] == [str(SHIMS / name) for name in NAMES]


def test_versions_and_metadata(shims):
    for package, distribution in (("mamba_ssm", "mamba-ssm"), ("causal_conv1d", "causal-conv1d")):
        version = importlib.import_module(package).__version__
        assert importlib.metadata.version(distribution) == version and version.endswith("+cobra")
        assert importlib.metadata.version(package) == version
    from packaging.version import Version

    assert Version(importlib.metadata.version("mamba_ssm")) > Version("2.0.4")
    assert Version(importlib.metadata.version("causal_conv1d")) > Version("1.5.1")


def test_in_subprocesses(shims):
    """Those that see the environment, and those that multiprocessing starts; theirs come back when it is taken away."""
    see = f"import importlib.util as u; print(all('shims' in u.find_spec(n).origin for n in {NAMES}))"
    assert run(see).strip() == "True"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert str(SHIMS) in pool.apply(importlib.util.find_spec, ("mamba_ssm",)).origin


def test_the_search_path_of_subprocesses_is_restored(monkeypatch, tmp_path):
    """As it was, empty entries (the working directory) included; ours go behind it, or before it to replace what is there."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for before in (f"/a{os.pathsep}{os.pathsep}/b", "/a"):
        monkeypatch.setenv("PYTHONPATH", before)
        compat.install()
        assert os.environ["PYTHONPATH"].startswith(before + os.pathsep + str(SHIMS))
        compat.install(force=True)
        assert os.environ["PYTHONPATH"].startswith(str(SHIMS / "mamba_ssm") + os.pathsep + before)
        compat.uninstall()
        assert os.environ["PYTHONPATH"] == before


def test_absent_names_say_so_when_called(shims):
    from mamba_ssm import Mamba2
    from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
    from mamba_ssm.ops.triton.layer_norm import _layer_norm_fwd
    from mamba_ssm.ops.triton.selective_state_update import _selective_scan_update_kernel
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    class Derived(ColumnParallelLinear):
        """Deriving from what is not there is no call of it either."""

    kernel = _selective_scan_update_kernel
    absent = (mamba_chunk_scan_combined, ssd_minimal_discrete, Mamba2, ColumnParallelLinear, Derived, _layer_norm_fwd, kernel)
    for call in (*absent, lambda: kernel[(1,)]):
        with pytest.raises(NotImplementedError, match=r"mamba_ssm\.\S+ is not provided by cobra_kernels"):
            call()


SCRIPT = """
import sys
import torch
from mamba_ssm import selective_scan_fn
import cobra_kernels
u = torch.randn(1, 4, 6)
selective_scan_fn(u, u, -torch.rand(4, 2), torch.randn(1, 2, 6), torch.randn(1, 2, 6))
print(__name__, sys.argv[1:], cobra_kernels.call_counts())
"""


def test_scripts_and_modules_need_no_edit(tmp_path):
    (tmp_path / "foreign.py").write_text(SCRIPT)
    script = run("", "-m", "cobra_kernels.compat", str(tmp_path / "foreign.py"), "--flag", "3")
    module = run("", "-m", "cobra_kernels.compat", "-m", "foreign", "--flag", "3", cwd=tmp_path)
    assert script == module
    assert script.startswith("__main__ ['--flag', '3'] {('selective_scan', ")


def test_the_command_line_explains_itself():
    done = subprocess.run([sys.executable, "-m", "cobra_kernels.compat"], capture_output=True, text=True)
    assert done.returncode == 2 and "SCRIPT ARGS" in done.stderr


def test_counters_prove_it(shims):
    import torch
    from causal_conv1d import causal_conv1d_fn

    cobra_kernels.reset_call_counts()
    causal_conv1d_fn(torch.randn(1, 4, 6), torch.randn(4, 3))
    assert sum(cobra_kernels.call_counts().values()) == 1
