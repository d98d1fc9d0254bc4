"""install() and uninstall(): `import mamba_ssm`, `import causal_conv1d` and the raw modules of both find our names.

Each name lies in a folder of its own under shims/, as if it were installed there: real modules with specs, and the metadata that
importlib.metadata reads. Installing is putting that folder on sys.path, and on PYTHONPATH for subprocesses: behind everything, so that
a really installed package is found first, or in front of everything with force=True.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from pathlib import Path

from . import transformers

SHIMS = Path(__file__).resolve().parent / "shims"
# The packages, then their compiled modules: those of mamba_ssm and causal_conv1d, which forks with Python files of their own call,
# and mamba_ssm itself where it was built without them; and the two that VMamba builds.
NAMES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda", "causal_conv1d_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex")

_lock = threading.RLock()
_replaced: dict[str, dict[str, object]] = {}  # name -> the modules that were there before


def install(force: bool = False) -> dict[str, str]:
    """Makes `mamba_ssm`, `causal_conv1d` and their raw modules importable here and in subprocesses, served by cobra_kernels.

    A name that is really installed stays unless `force`. Returns what each name now is. Call it before foreign code imports
    them; calling it again changes nothing. transformers, imported after it, runs Mamba mixers as apply_to_transformers() makes it.
    """
    with _lock:
        done = {name: _install(name, force) for name in NAMES}
        if {"mamba_ssm", "causal_conv1d"} <= _replaced.keys():  # else transformers has kernels that were asked to stay
            transformers.apply_on_import()
        return done


def uninstall() -> None:
    """Restores what install() found: search paths, and modules that were imported before."""
    with _lock:
        for name, modules in list(_replaced.items()):
            folder = str(SHIMS / name)
            sys.path[:] = [entry for entry in sys.path if entry != folder]
            _set_python_path([entry for entry in _python_path() if entry != folder])
            _forget(name)
            sys.modules.update(modules)
            del _replaced[name]
        transformers.stop_on_import()
        importlib.invalidate_caches()


def installed() -> tuple[str, ...]:
    """The names that install() serves at present."""
    with _lock:
        return tuple(_replaced)


def _install(name: str, force: bool) -> str:
    folder = str(SHIMS / name)
    if name in _replaced:
        return f"cobra_kernels ({folder})"
    found = _origin(name)
    if found is not None and not force:
        return f"the installed package ({found}); force=True replaces it"
    _replaced[name] = _forget(name)
    if found is None:
        sys.path.append(folder)
        _set_python_path([*_python_path(), folder])
    else:
        sys.path.insert(0, folder)
        _set_python_path([folder, *_python_path()])
    importlib.invalidate_caches()
    return f"cobra_kernels ({folder})" + (f", in place of {found}" if found is not None else "")


def _origin(name: str) -> str | None:
    """Where a name would be imported from; None if it is not there, or is a mere folder of that name, such as a checkout's."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        return None if spec is None else spec.origin
    module = sys.modules[name]
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.origin is None and hasattr(module, "__path__"):
        return None  # a folder, imported
    return getattr(module, "__file__", None) or "already imported"


def _forget(name: str) -> dict[str, object]:
    """Takes the modules of a name out of sys.modules."""
    names = [key for key in sys.modules if key == name or key.startswith(name + ".")]
    return {key: sys.modules.pop(key) for key in names}


def _python_path() -> list[str]:
    value = os.environ.get("PYTHONPATH")
    return value.split(os.pathsep) if value else []


def _set_python_path(entries: list[str]) -> None:
    if entries:
        os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    else:
        os.environ.pop("PYTHONPATH", None)
