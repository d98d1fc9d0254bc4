"""install() and uninstall(): `import mamba_ssm` and `import causal_conv1d` find our names.

Each package lies in a folder of its own under shims/, as if it were installed there: real modules with specs, and the metadata that
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

SHIMS = Path(__file__).resolve().parent / "shims"
PACKAGES = ("mamba_ssm", "causal_conv1d")
RAW = {"mamba_ssm": "selective_scan_cuda", "causal_conv1d": "causal_conv1d_cuda"}

_lock = threading.RLock()
_replaced: dict[str, dict[str, object]] = {}  # package -> the modules that were there before


def install(force: bool = False) -> dict[str, str]:
    """Makes `mamba_ssm` and `causal_conv1d` importable here and in subprocesses, served by cobra_kernels.

    A package that is really installed stays unless `force`. Returns what each name now is. Call it before foreign code imports
    them; calling it again changes nothing.
    """
    with _lock:
        return {package: _install(package, force) for package in PACKAGES}


def uninstall() -> None:
    """Restores what install() found: search paths, and modules that were imported before."""
    with _lock:
        for package, modules in list(_replaced.items()):
            folder = str(SHIMS / package)
            sys.path[:] = [entry for entry in sys.path if entry != folder]
            paths = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != folder]
            if paths:
                os.environ["PYTHONPATH"] = os.pathsep.join(paths)
            else:
                os.environ.pop("PYTHONPATH", None)
            _forget(package)
            sys.modules.update(modules)
            del _replaced[package]
        importlib.invalidate_caches()


def installed() -> tuple[str, ...]:
    """The packages that install() serves at present."""
    with _lock:
        return tuple(_replaced)


def _install(package: str, force: bool) -> str:
    if package in _replaced:
        return f"cobra_kernels ({SHIMS / package})"
    found = _origin(package)
    if found is not None and not force:
        return f"the installed package ({found}); force=True replaces it"
    folder = str(SHIMS / package)
    _replaced[package] = _forget(package)
    sys.path.insert(0, folder) if found is not None else sys.path.append(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    importlib.invalidate_caches()
    return f"cobra_kernels ({folder})" + (f", in place of {found}" if found is not None else "")


def _origin(package: str) -> str | None:
    """Where a package would be imported from; None if it is not there, or is a mere folder of that name, such as a checkout's."""
    if package in sys.modules:
        return getattr(sys.modules[package], "__file__", None) or "already imported"
    spec = importlib.util.find_spec(package)
    return None if spec is None else spec.origin


def _forget(package: str) -> dict[str, object]:
    """Takes the modules of a package out of sys.modules."""
    names = [name for name in sys.modules if name in (package, RAW[package]) or name.startswith(package + ".")]
    return {name: sys.modules.pop(name) for name in names}
