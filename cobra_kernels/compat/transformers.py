"""Hugging Face transformers 5 on our kernels after it was imported: apply_to_transformers(). Before the import, install() is enough.

Modeling files decide at import which functions they call, and keep them as globals. This replaces those globals, and the forward of
Mamba-1 mixers and models, in every modeling file that is loaded or in those of one model; undo() puts them back.
"""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import sys
import threading
import weakref
from contextvars import ContextVar

import torch
from torch import nn

import cobra_kernels
from cobra_kernels.linear import RoutedLinear, apply_linear, is_plain, linear

PREFIX = "transformers.models."
# The states that a mixer's next scans start from, in their order: see continue_from_cache.
_initial_states: ContextVar[tuple[torch.Tensor, ...]] = ContextVar("initial_states", default=())
_lock = threading.RLock()
_replaced: list[tuple[object, str, object]] = []  # (module or class, name, what was there)
# Models that are gone by the time of undo() need none.
_routed_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_routed: weakref.WeakSet[nn.Linear] = weakref.WeakSet()


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
    initial_state = None
    if not torch.compiler.is_compiling():  # a compiled mixer that continues is not compiled
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


def _separate_layers(xz, *args, **kwargs):
    """mamba_inner_fn of a modeling file whose mixer has our forward: what comes here has an adapter, a hook, a parametrization in it."""


# What modeling files call these functions.
FUNCTIONS = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_inner_fn": _separate_layers,
    "mamba_selective_scan": selective_scan_fn,
    "mamba_selective_state_update": selective_state_update,
    "mamba2_selective_state_update": selective_state_update,
}
# Mixers with one in_proj, conv1d, x_proj, dt_proj and out_proj each; those of FalconMamba and Jamba norm dt, B and C between.
MIXERS = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")


def apply_to_transformers(model: nn.Module | None = None, *, continue_from_cache: bool = False) -> list[str]:
    """Makes modeling files of transformers that are loaded, or those that `model` is made of, call our kernels.

    model: other models of its families are served too.
    continue_from_cache: a forward of several tokens with a cache continues the recurrence of Mamba-1 layers; transformers itself starts
        it again from zero, so that a prompt read in pieces is forgotten.
    A mixer that is more than plain layers (adapters, hooks, quantized weights) keeps its own forward, and gets the single functions.
    The nn.Linear layers of a Mamba-1 language model, such as its head, become `cobra_kernels.linear.RoutedLinear` at its first forward:
    the same layer, on the faster of torch's product libraries.
    Returns what was replaced, as "module.name". Calling it again replaces nothing twice.
    """
    with _lock:
        done = [name for module in _modeling_files(model) for name in _apply(module)]
        if continue_from_cache:
            done += [name for module in _modeling_files(model) for name in _continue(module) if name not in done]
        return done


def undo() -> None:
    """Puts back everything that apply_to_transformers replaced."""
    with _lock:
        while _replaced:
            owner, name, original = _replaced.pop()
            setattr(owner, name, original)
        for layer in _routed:
            layer.__class__ = nn.Linear
        _routed.clear()
        _routed_models.clear()


class _OnImport:
    """A finder in front of the others: modeling files are changed as soon as they are loaded."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if not name.startswith(PREFIX) or ".modeling_" not in name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_apply(spec.loader.exec_module)
        return spec


def apply_on_import() -> None:
    """From here on, modeling files call our kernels as soon as they are imported. For install()."""
    if _OnImport not in sys.meta_path:
        sys.meta_path.insert(0, _OnImport)


def stop_on_import() -> None:
    """Ends apply_on_import(); what was imported meanwhile stays, for undo()."""
    if _OnImport in sys.meta_path:
        sys.meta_path.remove(_OnImport)


def _then_apply(load):
    def exec_module(module):
        load(module)
        with _lock:
            _apply(module)

    return exec_module


def _modeling_files(model):
    if model is None:
        names = [name for name in sys.modules if name.startswith(PREFIX) and ".modeling_" in name]
    else:
        names = list({type(layer).__module__: None for layer in model.modules() if type(layer).__module__.startswith(PREFIX)})
    return [sys.modules[name] for name in names]


def _apply(module) -> list[str]:
    """Replaces the functions of one modeling file, and the forward of its mixers where they are Mamba-1's."""
    done = []
    for name, function in FUNCTIONS.items():
        original = getattr(module, name, None)
        if callable(original) and getattr(original, "__module__", None) == module.__name__ and not hasattr(original, "_cobra_kernels"):
            done.append(_replace(module, name, _called_like(original, function)))
    for mixer in _mixers(module):
        if mixer.__name__ in MIXERS and not hasattr(mixer.forward, "_cobra_kernels"):
            done.append(_replace(mixer, "forward", _without_detours(mixer.forward)))
            done += [_replace(kind, "forward", _routing(kind.forward)) for kind in _classes(module, "ForCausalLM")]
    return done


def _continue(module) -> list[str]:
    return [_replace(mixer, "forward", _continuing(mixer.forward)) for mixer in _mixers(module) if not hasattr(mixer.forward, "_continues")]


def _mixers(module) -> list[type]:
    """The classes of a modeling file that call mamba_selective_scan."""
    return _classes(module, "Mixer") if hasattr(module, "mamba_selective_scan") else []


def _classes(module, ending: str) -> list[type]:
    return [kind for name, kind in vars(module).items() if inspect.isclass(kind) and name.endswith(ending)]


def _replace(owner, name: str, replacement) -> str:
    _replaced.append((owner, name, getattr(owner, name)))
    setattr(owner, name, replacement)
    return f"{owner.__module__}.{owner.__name__}.{name}" if inspect.isclass(owner) else f"{owner.__name__}.{name}"


def _serves(first: torch.Tensor, activation: str | None) -> bool:
    """Whether our kernels have code for it. transformers makes A and D fp32 in fp64 models too, a mix that they refuse."""
    return first.dtype != torch.float64 and (first.is_cpu or first.is_cuda) and activation in (None, "silu", "swish")


def _called_like(original, function):
    """`function` for callers of `original`: keywords that only its torch path knows are dropped, as transformers does for kernels.
    What our kernels have no code for stays with the torch path."""
    known = inspect.signature(function).parameters
    torch_path = inspect.unwrap(original)

    @functools.wraps(original)
    def call(first, *args, **kwargs):
        if not _serves(first, kwargs.get("activation", "silu")):
            return torch_path(first, *args, **kwargs)
        return function(first, *args, **{name: value for name, value in kwargs.items() if name in known})

    call._cobra_kernels = True
    return call


def _without_detours(original):
    """A Mamba-1 mixer's forward on the same calls, with products on the faster library, dt, B and C read where they lie, and one op for
    all behind in_proj where gradients are wanted. It keeps to `original` where a layer between is more than its weight and bias."""

    @functools.wraps(original)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        conv1d, dt_proj, dtype = self.conv1d, self.dt_proj, hidden_states.dtype
        if (
            not (is_plain(conv1d, nn.Conv1d) and is_plain(dt_proj, nn.Linear))
            or not _serves(hidden_states, self.activation)
            or kwargs.get("seq_idx") is not None
            or torch.compiler.is_compiling()
        ):
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)
        seqlen, layer = hidden_states.shape[1], self.layer_idx
        conv_state = ssm_state = None
        if cache_params is not None:
            conv_state, ssm_state = cache_params.get_conv_state(layer, state_idx=0), cache_params.get_recurrent_state(layer, state_idx=0)
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, None]
            hidden_states = (hidden_states * attention_mask).to(dtype)
        xz = apply_linear(self.in_proj, hidden_states).transpose(1, 2)
        A = -torch.exp(self.A_log.float())
        normed = hasattr(self, "dt_layernorm")
        if _wants_inner(self, cache_params, attention_mask, normed):
            return cobra_kernels.mamba_inner(
                xz, conv1d.weight, conv1d.bias, self.x_proj.weight, dt_proj.weight, self.out_proj.weight, self.out_proj.bias, A, D=self.D,
                delta_bias=dt_proj.bias,
            )  # fmt: skip
        u, z = xz.chunk(2, dim=1)  # (batch, dim, seqlen), channel-last

        weight = conv1d.weight.squeeze(1)
        if conv_state is not None and seqlen == 1 and not cache_params.is_recording_past(layer):
            u = cobra_kernels.causal_conv1d_update(u, conv_state, weight, conv1d.bias, self.activation)
        else:
            if cache_params is not None:
                u = cache_params.update_conv_state(u, layer, conv_kernel_size=self.conv_kernel_size)
            u = cobra_kernels.causal_conv1d(u, weight, conv1d.bias, activation=self.activation)[:, :, -seqlen:]
        if attention_mask is not None:
            u = (u.transpose(1, 2) * attention_mask).to(u.dtype).transpose(1, 2)

        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = apply_linear(self.x_proj, u.transpose(1, 2)).split(sizes, dim=-1)
        if normed:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        delta = linear(dt, dt_proj.weight)  # (batch, seqlen, dim)
        if ssm_state is not None and seqlen == 1:
            y = cobra_kernels.selective_state_update(
                ssm_state, u[..., 0], delta[:, 0], A, B[:, 0], C[:, 0], self.D, z[..., 0], dt_proj.bias, dt_softplus=True
            )
            return apply_linear(self.out_proj, y[:, None].to(dtype))
        y = selective_scan_fn(
            u, delta.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), self.D, z, dt_proj.bias, delta_softplus=True,
            return_last_state=cache_params is not None,
        )  # fmt: skip
        if cache_params is not None:
            y, last_state = y
            cache_params.update_recurrent_state(last_state, layer)
        return apply_linear(self.out_proj, y.transpose(1, 2).to(dtype))

    forward._cobra_kernels = True
    return forward


def _routing(forward):
    """A language model's forward that first turns its linear layers into RoutedLinear; the mixers choose their library themselves."""

    @functools.wraps(forward)
    def routing(self, *args, **kwargs):
        if not torch.compiler.is_compiling() and self not in _routed_models:
            _routed_models.add(self)
            for part in self.modules():
                if type(part).__name__ not in MIXERS:
                    for layer in part.children():
                        if type(layer) is nn.Linear:
                            layer.__class__ = RoutedLinear
                            _routed.add(layer)
        return forward(self, *args, **kwargs)

    routing._cobra_kernels = True
    return routing


def _wants_inner(mixer, cache_params, attention_mask, normed: bool) -> bool:
    """Whether mamba_inner is all that is left to do: it keeps no cache, masks nothing behind the convolution, norms nothing before dt_proj,
    and calls no layer."""
    if not torch.is_grad_enabled() or cache_params is not None or normed:
        return False
    if attention_mask is not None and not (attention_mask.is_cpu and bool(attention_mask.all())):  # asking a GPU would wait for it
        return False
    return is_plain(mixer.x_proj, nn.Linear) and is_plain(mixer.out_proj, nn.Linear)


def _continuing(forward):
    """A mixer's forward that starts its scan from the cached state when it is given more than one token."""
    scan_from = torch.compiler.disable(_scan_from)  # a context variable is nothing that torch.compile could follow

    @functools.wraps(forward)
    def continuing(self, hidden_states, cache_params=None, *args, **kwargs):
        if cache_params is not None and hidden_states.shape[1] > 1:
            state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
            if state is not None:  # a layer of several heads, (batch, heads, dim, dstate), scans one after the other
                states = state.clone().unbind(1) if state.dim() == 4 else (state.clone(),)
                return scan_from(states, forward, self, hidden_states, cache_params, *args, **kwargs)
        return forward(self, hidden_states, cache_params, *args, **kwargs)

    continuing._continues = True
    return continuing


def _scan_from(states, forward, *args, **kwargs):
    token = _initial_states.set(states)
    try:
        return forward(*args, **kwargs)
    finally:
        _initial_states.reset(token)
