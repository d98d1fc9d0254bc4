"""The functions that mamba_ssm 2.x calls."""

from cobra_kernels.compat.raw import causal_conv1d_bwd_function, causal_conv1d_fwd_function, causal_conv1d_update_function

__all__ = ["causal_conv1d_bwd_function", "causal_conv1d_fwd_function", "causal_conv1d_update_function"]
