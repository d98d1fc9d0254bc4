"""Hugging Face transformers 5 on our kernels after it was imported: apply_to_transformers(). Before the import, install() is enough.

Modeling files decide at import which functions they call, and keep them as globals. This replaces those globals, in every modeling file
that is loaded or in those of one model, and undo() puts them back.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from contextvars import ContextVar

import torch

import cobra_kernels

PREFIX = "transformers.models."
# The states that a mixer's next scans start from, in their order: see continue_from_cache.
_initial_states: ContextVar[tuple[torch.Tensor, ...]] = ContextVar("initial_states", default=())
_lock = threading.RLock()
_replaced: list[tuple[object, str, object]] = []  # (module or class, name, what was there)


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    """See `cobra_kernels.causal_conv1d`."""
    return cobra_kernels.causal_conv1d(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """See `cobra_kernels.causal_conv1d_update`."""
    return cobra_kernels.causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """See `cobra_kernels.selective_scan`; from the state that continue_from_cache found, if any."""
    initial_state, *later = _initial_states.get() or (None,)
    _initial_states.set(tuple(later))
    return cobra_kernels.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state=initial_state)


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """See `cobra_kernels.selective_state_update`."""
    return cobra_kernels.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


def mamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None, D=None,
    delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """See `cobra_kernels.mamba_inner`; or None, which sends transformers along its separate layers, where the two would not be the same:

    - a weight is frozen: the layer may carry an adapter, which this function, given weights and not layers, would leave out;
    - dt_rms_weight: FalconMamba's layers norm dt (dt_rank) before its projection, mamba_ssm's function (dim) behind it.
    """
    weights = (conv1d_weight, x_proj_weight, delta_proj_weight, out_proj_weight)
    if dt_rms_weight is not None or (torch.is_grad_enabled() and not all(weight.requires_grad for weight in weights)):
        return None
    return cobra_kernels.mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip


# What modeling files call these functions.
FUNCTIONS = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_inner_fn": mamba_inner_fn,
    "mamba_selective_scan": selective_scan_fn,
    "mamba_selective_state_update": selective_state_update,
    "mamba2_selective_state_update": selective_state_update,
}


def apply_to_transformers(model: torch.nn.Module | None = None, *, continue_from_cache: bool = False) -> list[str]:
    """Makes modeling files of transformers that are loaded, or those that `model` is made of, call our kernels.

    continue_from_cache: a forward of several tokens with a cache continues the recurrence of Mamba-1 layers; transformers itself starts
        it again from zero, so that a prompt read in pieces is forgotten.
    Returns what was replaced, as "module.name". Calling it again replaces nothing twice.
    """
    with _lock:
        done = []
        for module in _modeling_files(model):
            for name, function in FUNCTIONS.items():
                original = getattr(module, name, None)
                if callable(original) and getattr(original, "__module__", None) == module.__name__ and not hasattr(original, "_cobra_kernels"):
                    _replace(module, name, _called_like(original, function))
                    done.append(f"{module.__name__}.{name}")
            if continue_from_cache and hasattr(module, "mamba_selective_scan"):
                for name, mixer in vars(module).items():
                    if inspect.isclass(mixer) and name.endswith("Mixer") and not hasattr(mixer.forward, "_cobra_kernels"):
                        _replace(mixer, "forward", _continuing(mixer.forward))
                        done.append(f"{module.__name__}.{name}.forward")
        return done


def undo() -> None:
    """Puts back everything that apply_to_transformers replaced."""
    with _lock:
        while _replaced:
            owner, name, original = _replaced.pop()
            setattr(owner, name, original)


def _modeling_files(model):
    if model is None:
        names = [name for name in sys.modules if name.startswith(PREFIX) and ".modeling_" in name]
    else:
        names = list({type(layer).__module__: None for layer in model.modules() if type(layer).__module__.startswith(PREFIX)})
    return [sys.modules[name] for name in names]


def _replace(owner, name: str, replacement) -> None:
    _replaced.append((owner, name, getattr(owner, name)))
    setattr(owner, name, replacement)


def _called_like(original, function):
    """`function` for callers of `original`: keywords that only its torch path knows are dropped, as transformers does for kernels."""
    known = inspect.signature(function).parameters

    @functools.wraps(original)
    def call(*args, **kwargs):
        return function(*args, **{name: value for name, value in kwargs.items() if name in known})

    call._cobra_kernels = True
    return call


def _continuing(forward):
    """A mixer's forward that starts its scan from the cached state when it is given more than one token."""

    @functools.wraps(forward)
    def continuing(self, hidden_states, *args, **kwargs):
        bound = inspect.signature(forward).bind(self, hidden_states, *args, **kwargs).arguments
        cache = bound.get("cache_params", bound.get("past_key_values"))
        states: tuple[torch.Tensor, ...] = ()
        if cache is not None and hidden_states.shape[1] > 1:
            state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
            if state is not None:  # a layer of several heads, (batch, heads, dim, dstate), scans one after the other
                states = state.clone().unbind(1) if state.dim() == 4 else (state.clone(),)
        token = _initial_states.set(states)
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            _initial_states.reset(token)

    continuing._cobra_kernels = True
    return continuing
