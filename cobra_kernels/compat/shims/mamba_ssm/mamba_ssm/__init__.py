"""The names of mamba_ssm 2.3.2.post1, served by cobra_kernels."""

__version__ = "2.3.2.post1+cobra"

from cobra_kernels.compat.absent import asked_by_transformers

from .models.mixer_seq_simple import MambaLMHeadModel
from .modules.mamba2 import Mamba2
from .modules.mamba3 import Mamba3
from .modules.mamba_simple import Mamba
from .ops import selective_scan_interface
from .ops.selective_scan_interface import selective_scan_fn
from .ops.triton.selective_state_update import selective_state_update

__all__ = [
    "Mamba", "Mamba2", "Mamba3", "MambaLMHeadModel", "__version__", "mamba_inner_fn", "selective_scan_fn", "selective_state_update",
]  # fmt: skip


def __getattr__(name: str):
    """mamba_inner_fn, which is another for transformers: see its module."""
    if name != "mamba_inner_fn":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return selective_scan_interface.frozen_aware if asked_by_transformers() else selective_scan_interface._mamba_inner_fn
