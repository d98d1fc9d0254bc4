"""The raw C++ entries of upstream, for code that calls them directly: positional arguments, results as lists or written in place.

causal_conv1d_cuda changed its arguments three times; the number of arguments tells which form a caller was written for.
"""

from __future__ import annotations

import torch

import cobra_kernels

STEPS_PER_CHUNK = 2048  # of upstream's scan buffer


def _gradients(outputs, inputs, incoming):
    """Gradients of the inputs that are given, None for the others."""
    given = [t for t in inputs if t is not None]
    pairs = [(out, dout) for out, dout in zip(outputs, incoming) if dout is not None]
    found = iter(torch.autograd.grad([out for out, _ in pairs], given, [dout for _, dout in pairs]))
    return [None if t is None else next(found) for t in inputs]


def _leaves(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def _activation(silu: bool) -> str | None:
    return "silu" if silu else None


# --- selective_scan_cuda ---------------------------------------------------------------------------------------------


def scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """[out, x], or [out, x, out_z] with z: out before the gate, out_z behind it.

    x (batch, dim, chunks of 2048 steps, 2 * dstate) has the state after the last step in x[:, :, -1, 1::2], where callers look for
    it; the rest is zeros.
    """
    with torch.no_grad():
        out, last_state = cobra_kernels.selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True)
        batch, dim, seqlen = u.shape
        chunks = max(1, -(-seqlen // STEPS_PER_CHUNK))
        x = last_state.new_zeros(batch, dim, chunks, 2 * A.shape[1])
        x[:, :, -1, 1::2] = last_state
        if z is None:
            return [out, x]
        return [out, x, cobra_kernels.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)]


def scan_bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz with z, then out_z if recomputed. dz, if given, is written.

    x and out are what scan_fwd returned; they are not needed here.
    """
    u_, delta_, A_, B_, C_, D_, z_, bias_ = leaves = _leaves(u, delta, A, B, C, D, z, delta_bias)
    with torch.enable_grad():
        out_z = cobra_kernels.selective_scan(u_, delta_, A_, B_, C_, D_, z_, bias_, delta_softplus)
    du, ddelta, dA, dB, dC, dD, dgate, dbias = _gradients([out_z], leaves, [dout])
    results = [du, ddelta, dA, dB, dC, dD, dbias]
    if z is not None:
        results.append(dgate if dz is None else dz.copy_(dgate))
        if recompute_out_z:
            results.append(out_z.detach())
    return results


# --- selective_scan_cuda_core and selective_scan_cuda_oflex, of VMamba -----------------------------------------------


def vmamba_scan_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, out_float=False):
    """[out, x] as scan_fwd without a gate. nrows tunes the kernel of VMamba and is not used. out_float: out is fp32."""
    u = u.float() if out_float and u.dtype != torch.float64 else u
    return scan_fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def vmamba_scan_bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows):
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias]; dout is fp32 for an fp32 out, du has u's dtype all the same."""
    du, *rest = scan_bwd(u.to(dout.dtype), delta, A, B, C, D, None, delta_bias, dout, x, None, None, delta_softplus, False)
    return [du.to(u.dtype), *rest]


# --- causal_conv1d_cuda and causal_conv1d.cpp_functions --------------------------------------------------------------


def conv1d(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation):
    """`cobra_kernels.causal_conv1d`, with initial states that are of the first sequence of seq_idx too, as upstream has it from 1.7."""
    history = 0
    if seq_idx is not None and initial_states is not None and x.shape[2]:
        history = initial_states.shape[2]
        x = torch.cat([initial_states.to(x.dtype), x], dim=2)
        seq_idx = torch.cat([seq_idx[:, :1].expand(-1, history), seq_idx], dim=1)
        initial_states = None
    out = cobra_kernels.causal_conv1d(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)
    return out[:, :, history:] if history else out


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    """out; final_states_out, if given, is written."""
    with torch.no_grad():
        out = conv1d(x, weight, bias, seq_idx, initial_states, final_states_out is not None, final_states_out, _activation(silu_activation))
    return out if final_states_out is None else out[0]


def causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation):
    """(dx, dweight, dbias, dinitial_states), None for what is absent or not wanted; dx, if given, is written."""
    x_, weight_, bias_, initial_ = leaves = _leaves(x, weight, bias, initial_states)
    with torch.enable_grad():
        out = conv1d(x_, weight_, bias_, seq_idx, initial_, dfinal_states is not None, None, _activation(silu_activation))
    outputs = out if isinstance(out, tuple) else (out,)
    got, dweight, dbias, dinitial = _gradients(outputs, leaves, [dout, dfinal_states])
    return got if dx is None else dx.copy_(got), dweight, dbias, dinitial if return_dinitial_states else None


def causal_conv1d_update_function(x, conv_state, weight, bias, silu_activation, cache_seqlens=None, conv_state_indices=None):
    """out; conv_state is written."""
    return conv1d_update(x, conv_state, weight, bias, _activation(silu_activation), cache_seqlens, conv_state_indices)


def conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices):
    """`cobra_kernels.causal_conv1d_update`, for more steps than a circular conv_state holds too: in pieces that it does."""
    state_len = conv_state.shape[-1]
    if cache_seqlens is None or x.dim() < 3 or x.shape[2] <= state_len:
        return cobra_kernels.causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    # Each piece but the last goes around once, so that all of them begin at the same column.
    pieces = [
        cobra_kernels.causal_conv1d_update(piece, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
        for piece in x.split(state_len, dim=2)
    ]
    return torch.cat(pieces, dim=2)


def _refuse(name: str, count: int, forms: dict[int, str]):
    expected = "; ".join(f"{n} ({form})" for n, form in forms.items())
    raise cobra_kernels.errors.ArgumentError(f"causal_conv1d_cuda.{name}: {count} arguments, expected {expected}")


def causal_conv1d_fwd(*args):
    """1.0: (x, weight, bias, silu), 1.1: (.., seq_idx, silu) and 1.2 to 1.5.0: (.., seq_idx, initial_states, final_states_out, silu)
    return out; from 1.5.1: (.., initial_states, out, final_states_out, silu) writes out."""
    if len(args) == 4:
        x, weight, bias, silu = args
        return causal_conv1d_fwd_function(x, weight, bias, None, None, None, silu)
    if len(args) == 5:
        x, weight, bias, seq_idx, silu = args
        return causal_conv1d_fwd_function(x, weight, bias, seq_idx, None, None, silu)
    if len(args) == 7:
        return causal_conv1d_fwd_function(*args)
    if len(args) == 8:
        x, weight, bias, seq_idx, initial_states, out, final_states_out, silu = args
        out.copy_(causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu))
        return None
    return _refuse("causal_conv1d_fwd", len(args), {4: "1.0", 5: "1.1", 7: "1.2 to 1.5.0", 8: "1.5.1 and later"})


def causal_conv1d_bwd(*args):
    """1.0: (x, weight, bias, dout, dx, silu), 1.1: (.., dout, seq_idx, dx, silu) -> (dx, dweight, dbias); 1.2 to 1.5.0:
    cpp_functions' form -> four gradients; from 1.5.1: (.., dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias,
    dinitial_states, silu) writes them."""
    if len(args) == 6:
        x, weight, bias, dout, dx, silu = args
        return causal_conv1d_bwd_function(x, weight, bias, dout, None, None, None, dx, False, silu)[:3]
    if len(args) == 7:
        x, weight, bias, dout, seq_idx, dx, silu = args
        return causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, None, None, dx, False, silu)[:3]
    if len(args) == 10:
        return causal_conv1d_bwd_function(*args)
    if len(args) == 12:
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, *written, silu = args
        got = causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, None, True, silu)
        for buffer, gradient in zip(written, got):
            if buffer is not None and gradient is not None:
                buffer.copy_(gradient)
        return None
    return _refuse("causal_conv1d_bwd", len(args), {6: "1.0", 7: "1.1", 10: "1.2 to 1.5.0", 12: "1.5.1 and later"})


def causal_conv1d_update(*args):
    """Up to 1.3: (x, conv_state, weight, bias, silu), then with cache_seqlens, then with conv_state_indices: all return out; from
    1.5.1: (x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices) writes out. conv_state is written always."""
    if len(args) in (5, 6, 7):
        return causal_conv1d_update_function(*args)
    if len(args) == 8:
        x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices = args
        out.copy_(causal_conv1d_update_function(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices))
        return None
    return _refuse("causal_conv1d_update", len(args), {5: "1.0 to 1.3", 6: "1.4", 7: "1.5.0", 8: "1.5.1 and later"})


def causal_conv1d_varlen_states(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """x (total, dim) -> (sequences, dim, state_len): the last inputs of each packed sequence, zeros before its first. No host wait."""
    begins, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    at = ends[:, None] - torch.arange(state_len, 0, -1, device=x.device)  # (sequences, state_len)
    taken = x[at.clamp(min=0)] if x.shape[0] else x.new_zeros(*at.shape, x.shape[1])
    return taken.masked_fill((at < begins[:, None])[..., None], 0).transpose(1, 2).contiguous()
