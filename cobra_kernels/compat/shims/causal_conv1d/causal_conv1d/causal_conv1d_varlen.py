"""States of packed sequences under upstream's names."""

from cobra_kernels.compat.raw import causal_conv1d_varlen_states
from cobra_kernels.compat.references import causal_conv1d_varlen_states_ref

__all__ = ["causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"]
