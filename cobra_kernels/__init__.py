"""Kernels for Mamba-1 and Cobra's vision-language projector: CUDA, Triton, C++ and a plain-torch reference.

Importing opens no socket, writes no file and compiles nothing.
"""

from . import errors
from .dispatch import backends, call_counts, reset_call_counts, supports, use_backend
from .ops.rms_norm import rms_norm

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "backends",
    "call_counts",
    "errors",
    "reset_call_counts",
    "rms_norm",
    "supports",
    "use_backend",
]
