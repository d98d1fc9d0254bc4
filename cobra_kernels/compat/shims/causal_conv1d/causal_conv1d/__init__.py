"""The names of causal_conv1d 1.7.0, served by cobra_kernels."""

__version__ = "1.7.0+cobra"

from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = ["__version__", "causal_conv1d_fn", "causal_conv1d_update"]
