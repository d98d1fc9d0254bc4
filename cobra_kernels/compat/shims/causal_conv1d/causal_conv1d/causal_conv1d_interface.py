"""The convolution under upstream's names and signatures."""

from __future__ import annotations

from cobra_kernels.compat.raw import conv1d, conv1d_update
from cobra_kernels.compat.references import causal_conv1d_ref, causal_conv1d_update_ref

__all__ = ["CausalConv1dFn", "causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    """See `cobra_kernels.causal_conv1d`; with seq_idx, initial_states are of the first sequence of each row."""
    return conv1d(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """See `cobra_kernels.causal_conv1d_update`; `conv_state` is written in place."""
    return conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


class CausalConv1dFn:
    """Upstream's autograd function, as far as callers see it."""

    apply = staticmethod(causal_conv1d_fn)
