"""Kernels for Mamba-1 and Cobra's vision-language projector: CUDA, Triton, C++ and a plain-torch reference.

Importing opens no socket, writes no file and compiles nothing.
"""

from . import errors
from .dispatch import backends, call_counts, reset_call_counts, supports, use_backend
from .ops.causal_conv1d import causal_conv1d
from .ops.causal_conv1d_update import causal_conv1d_update
from .ops.mamba_inner import mamba_inner
from .ops.projector import ldp_projector, mlp_projector
from .ops.rms_norm import rms_norm
from .ops.selective_scan import selective_scan
from .ops.selective_state_update import selective_state_update
from .selfcheck import selftest

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "backends",
    "call_counts",
    "causal_conv1d",
    "causal_conv1d_update",
    "errors",
    "ldp_projector",
    "mamba_inner",
    "mlp_projector",
    "reset_call_counts",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "selftest",
    "supports",
    "use_backend",
]
