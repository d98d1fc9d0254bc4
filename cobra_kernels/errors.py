"""Every error this package raises on purpose. Messages read "op: argument got ..., expected ...; who decided it"."""

from __future__ import annotations


class CobraKernelsError(Exception):
    """Base of all errors of cobra_kernels."""


class ShapeError(CobraKernelsError, ValueError):
    """A tensor has the wrong shape, or shapes of several arguments do not go together."""


class DtypeError(CobraKernelsError, TypeError):
    """An argument has a dtype or type that the op does not take."""


class ArgumentError(CobraKernelsError, ValueError):
    """A value is not one of those allowed."""


class BackendUnavailable(CobraKernelsError, RuntimeError):
    """The backend asked for by name cannot serve; the message names the reason."""
