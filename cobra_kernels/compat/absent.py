"""Names of upstream packages that we do not provide: importing one works, calling it says so."""

from __future__ import annotations

import sys


def _message(name: str, instead: str | None) -> str:
    use = f"; use {instead}" if instead else ""
    return f"{name} is not provided by cobra_kernels: it has the kernels of Mamba-1{use}"


def function(name: str, instead: str | None = None):
    """A function that raises NotImplementedError when called."""

    def absent(*args, **kwargs):
        raise NotImplementedError(_message(name, instead))

    absent.__name__ = absent.__qualname__ = name.rpartition(".")[2]
    absent.__doc__ = _message(name, instead)
    return absent


def kernel(name: str, instead: str | None = None):
    """What stands for a Triton kernel, `kernel[grid](...)`: foreign code imports some by name and launches none."""

    class Absent:
        __doc__ = _message(name, instead)

        def __getitem__(self, grid):
            raise NotImplementedError(_message(name, instead))

        def __call__(self, *args, **kwargs):
            raise NotImplementedError(_message(name, instead))

        def __repr__(self) -> str:
            return f"<{name}: not provided>"

    return Absent()


def module(name: str):
    """A base class for modules whose construction raises."""

    class Absent:
        __doc__ = _message(name, None)

        def __init__(self, *args, **kwargs):
            raise NotImplementedError(_message(name, None))

    Absent.__name__ = Absent.__qualname__ = name.rpartition(".")[2]
    return Absent


def asked_by_transformers() -> bool:
    """Inside a module's `__getattr__`: is it transformers, which looks for kernels by getattr, that wants the name?"""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("transformers.")


def functions_of(module_name: str):
    """The `__getattr__` of a module that provides nothing. Code that imports a name gets a function that says so when called, or
    a class, by the way the name is written; transformers, which asks for one and has a torch path of its own otherwise, gets none."""

    def __getattr__(name: str):
        if name.startswith("__") or asked_by_transformers():
            raise AttributeError(f"module {module_name} has no attribute {name}")
        return (module if name[0].isupper() else function)(f"{module_name}.{name}")

    return __getattr__
