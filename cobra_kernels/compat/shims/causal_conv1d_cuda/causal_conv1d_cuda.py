"""The raw module of causal_conv1d, in the call forms of 1.0 to 1.7."""

from cobra_kernels.compat.raw import causal_conv1d_bwd, causal_conv1d_fwd, causal_conv1d_update

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]
