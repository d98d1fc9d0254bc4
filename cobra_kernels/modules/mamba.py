"""The Mamba block, its norm, and the state that carries it from one token to the next.

    x, z = in_proj(hidden)                         # (batch, seqlen, d_inner) each
    x = silu(causal_conv1d(x))
    dt, B, C = x_proj(x)                           # (batch, seqlen, dt_rank | d_state | d_state)
    y = selective_scan(x, dt_proj(dt), A, B, C) * silu(z)
    out = out_proj(y)                              # (batch, seqlen, d_model)

Activations stay token-major, (batch, seqlen, channels): the projections want them so, and the convolution and the scan
read their (batch, channels, seqlen) views in place, as channel-last. Nothing is transposed or copied between two
projections. Where gradients are wanted, all after in_proj is one op, `mamba_inner`, which keeps little more than its input.

Parameter names, shapes, order and initialisation are those of mamba_ssm's `Mamba`, so its checkpoints load unchanged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra_kernels import causal_conv1d, causal_conv1d_update, errors, mamba_inner, rms_norm, selective_scan, selective_state_update
from cobra_kernels.linear import apply_linear, is_plain, linear

_HALF = (torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are computed with, and in which the scan keeps its state."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class MambaState:
    """All that a Mamba model remembers of what it has read: a fixed number of bytes, however long the text was.

    conv: per layer (batch, d_inner, d_conv), the last d_conv inputs of the convolution, oldest first, zeros before the
    first token; in the dtype of the activations. ssm: per layer (batch, d_inner, d_state), fp32 unless asked otherwise.
    `prefill` and `decode` write both in place; `clone`, `expand` and `select` return memory of their own.
    """

    __slots__ = ("conv", "ssm")

    def __init__(self, conv: list[Tensor], ssm: list[Tensor]):
        if len(conv) != len(ssm) or not conv:
            raise errors.ArgumentError(
                f"MambaState: conv and ssm have {len(conv)} and {len(ssm)} layers, expected the same number, at least 1"
            )
        self.conv, self.ssm = list(conv), list(ssm)

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.conv)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """(conv, ssm) of one layer: the tensors themselves."""
        return self.conv[layer], self.ssm[layer]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.conv, self.ssm)

    def __repr__(self) -> str:
        conv, ssm = self[0]
        return (
            f"MambaState({len(self)} layers, batch {self.batch_size}, conv {tuple(conv.shape[1:])} {conv.dtype}, "
            f"ssm {tuple(ssm.shape[1:])} {ssm.dtype}, {self.nbytes / 1e6:.1f} MB on {self.device})"
        )

    @property
    def batch_size(self) -> int:
        return self.conv[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.conv[0].device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.conv, *self.ssm))

    def _map(self, fn) -> MambaState:
        return MambaState([fn(t) for t in self.conv], [fn(t) for t in self.ssm])

    def clone(self) -> MambaState:
        return self._map(torch.clone)

    def expand(self, batch_size: int) -> MambaState:
        """`batch_size` copies of a state of batch 1: many questions that start from one image."""
        if self.batch_size != 1:
            raise errors.ShapeError(f"MambaState.expand: the state has batch {self.batch_size}, expected 1; use select(rows)")
        return self._map(lambda t: t.expand(batch_size, -1, -1).clone(memory_format=torch.contiguous_format))

    def select(self, rows: Tensor | list[int]) -> MambaState:
        """A copy of the given batch rows, in that order; a row may be taken more than once."""
        rows = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        return self._map(lambda t: t.index_select(0, rows))

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ssm_dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Convert: `dtype` is for the convolution's part, `ssm_dtype` for the other (bf16 halves a kept image); as Tensor.to."""
        return MambaState(
            [t.to(device=device, dtype=dtype) for t in self.conv],
            [t.to(device=device, dtype=ssm_dtype) for t in self.ssm],
        )

    def copy_(self, other: MambaState) -> MambaState:
        """Overwrite this state with `other`, in place; the shapes must agree, the dtypes need not."""
        if len(other) != len(self) or other.conv[0].shape != self.conv[0].shape or other.ssm[0].shape != self.ssm[0].shape:
            raise errors.ShapeError(f"MambaState.copy_: other is {other!r}, expected the shape of {self!r}")
        for mine, theirs in zip((*self.conv, *self.ssm), (*other.conv, *other.ssm)):
            mine.copy_(theirs)
        return self

    def zero_(self) -> MambaState:
        """Forget everything, in place."""
        for t in (*self.conv, *self.ssm):
            t.zero_()
        return self


@dataclass
class InferenceParams:
    """The argument through which mamba_ssm passes states: the tensors of a state by layer index, and a token count.

    `seqlen_offset` 0 means that the next forward starts a new text, whatever the tensors hold; above 0 it continues.
    The caller advances it.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()

    @classmethod
    def from_state(cls, state: MambaState, max_seqlen: int, seqlen_offset: int) -> InferenceParams:
        """Share the memory of `state`: what a forward writes here is seen there."""
        layers = dict(enumerate(state))
        return cls(max_seqlen, state.batch_size, seqlen_offset=seqlen_offset, key_value_memory_dict=layers)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; with a residual, of the sum. See `cobra_kernels.rms_norm`."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual (..., hidden_size) -> y like x; with prenorm (y, x + residual)."""
        return rms_norm(x, self.weight, self.bias, residual, prenorm, residual_in_fp32, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


@cache
def _warn_half_precision(dtype: torch.dtype) -> None:
    # Cached: once a process and dtype, whatever the filters of `warnings` are and however many layers there are.
    warnings.warn(
        f"Mamba: A_log, D or dt_proj.bias is {dtype}, expected torch.float32: the state decays by them and loses "
        "accuracy. `.to()`, `.half()` and `.bfloat16()` of this module keep them fp32; something else cast them. "
        "Reload them in fp32, or say keep_fp32=False to have no warning.",
        stacklevel=4,
    )


class Mamba(nn.Module):
    """One Mamba mixer. Constructor, parameters and initialisation as in mamba_ssm.

    `A_log`, `D` and `dt_proj.bias` stay fp32 when the module is cast to a half type; `keep_fp32=False` lets them go
    along. `use_fast_path=False` keeps gradients from going through `mamba_inner`; it is left alone too when a submodule is
    anything but a plain layer (an adapter, a hook, a parametrization): its own forward is called then.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        keep_fp32: bool = True,
    ):
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise errors.ArgumentError(f"Mamba: dt_init has {dt_init!r}, expected 'random' or 'constant'")
        dtype = dtype or torch.get_default_dtype()
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.keep_fp32 = keep_fp32
        self.activation = "silu"

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        # Only weight and bias are used. padding is what makes the module's own forward causal, up to a tail to cut off.
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)

        # dt = softplus(weight x + bias) starts log-uniform in dt_min .. dt_max, and keeps its variance.
        dt_std = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, dt_std)
        else:
            nn.init.uniform_(self.dt_proj.weight, -dt_std, dt_std)
        kept = compute_dtype(dtype)
        dt = torch.rand(self.d_inner, device=device, dtype=torch.float32)
        dt = torch.exp(dt * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=dt_init_floor)
        inverse_softplus = dt + torch.log(-torch.expm1(-dt))
        self.dt_proj.bias = nn.Parameter(inverse_softplus.to(kept if keep_fp32 else dtype))
        self.dt_proj.bias._no_reinit = True

        A = torch.arange(1, d_state + 1, device=device, dtype=kept).repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(torch.log(A))  # (d_inner, d_state)
        self.A_log._no_weight_decay = True
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device, dtype=kept))
        self.D._no_weight_decay = True

        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self._A_cache: tuple[Tensor, int, Tensor] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: InferenceParams | None = None,
        *,
        state: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        state_indices: Tensor | None = None,
    ) -> Tensor:
        """Mix `hidden_states` (batch, seqlen, d_model) along time; returns the same shape and dtype.

        state: (conv_state (batch, d_inner, d_conv), ssm_state (batch, d_inner, d_state)), continued from and **written
            in place**; any number of new tokens. None: starts from zeros, keeps nothing.
        cu_seqlens: (num_seqs + 1,) int, batch 1: sequences packed end to end; the state then has num_seqs rows. What follows the last
            sequence is padding: the result is 0 there.
        state_indices: (batch,) int, one token a row: row b continues row state_indices[b] of the state, < 0 is padding.
        inference_params: the state as mamba_ssm passes it, instead of `state`.

        Gradients flow through the tokens of this call, not through the state. One token without gradients takes `step`.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.d_model:
            raise errors.ShapeError(
                f"Mamba: hidden_states has shape {tuple(hidden_states.shape)}, expected (batch, seqlen, "
                f"d_model={self.d_model}); d_model comes from the module"
            )
        batch, seqlen, _ = hidden_states.shape
        if inference_params is not None:
            if state is not None:
                raise errors.ArgumentError("Mamba: state and inference_params are both given, expected at most one")
            state = self._get_states_from_cache(inference_params, batch, inference_params.seqlen_offset == 0)
        if state is not None:
            if state_indices is None:
                self._check_state(state, batch if cu_seqlens is None else cu_seqlens.shape[0] - 1)
            one_token = seqlen == 1 and cu_seqlens is None
            if one_token and (state_indices is not None or not torch.is_grad_enabled()):
                return self.step(hidden_states, *state, state_indices)[0]
        if state_indices is not None:
            raise errors.ArgumentError(f"Mamba: state_indices is given for seqlen={seqlen}, expected seqlen=1, a state and no cu_seqlens")

        xz = apply_linear(self.in_proj, hidden_states).transpose(1, 2)
        x, z = xz.chunk(2, dim=1)  # (batch, d_inner, seqlen), channel-last
        conv_state = ssm_state = None
        if state is not None:
            # Autograd saves the initial states, and these buffers are about to change.
            conv_state, ssm_state = (t.clone() for t in state) if torch.is_grad_enabled() else state

        if self._trains_fused(xz):
            initial = {} if state is None else {"initial_conv_state": conv_state[:, :, 1:], "initial_ssm_state": ssm_state}
            out = mamba_inner(
                xz,
                self.conv1d.weight,
                self.conv1d.bias,
                self.x_proj.weight,
                self.dt_proj.weight,
                self.out_proj.weight,
                self.out_proj.bias,
                self.A(),
                D=self.D,
                delta_bias=self.dt_proj.bias,
                return_states=state is not None,
                cu_seqlens=cu_seqlens,
                **initial,
            )
            if state is not None:
                out, _, last_state = out
                self._keep_state(state, conv_state, x, last_state, cu_seqlens)
            return out

        u = self._convolve(x, conv_state, cu_seqlens)
        dt, B, C = apply_linear(self.x_proj, u.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, delta_bias = self._delta(dt)  # (batch, seqlen, d_inner)
        y = selective_scan(
            u,
            delta.transpose(1, 2),
            self.A(),
            B.transpose(1, 2),  # (batch, d_state, seqlen): columns of x_proj's output, read where they lie
            C.transpose(1, 2),
            self.D,
            z,
            delta_bias,
            delta_softplus=True,
            return_last_state=state is not None,
            initial_state=ssm_state,
            cu_seqlens=cu_seqlens,
        )
        if state is not None:
            y, last_state = y
            self._keep_state(state, conv_state, x, last_state, cu_seqlens)
        out = apply_linear(self.out_proj, y.transpose(1, 2))
        if cu_seqlens is not None and getattr(self.out_proj, "bias", None) is not None:
            out = torch.where((torch.arange(seqlen, device=out.device) < cu_seqlens[-1])[:, None], out, 0)  # padding, as in mamba_inner
        return out

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, state_indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token: hidden_states (batch, 1, d_model) -> (out like it, conv_state, ssm_state), both **written in
        place**.

        conv_state (batch | pool, d_inner, d_conv), ssm_state (batch | pool, d_inner, d_state). state_indices (batch,)
        int: the row of the pool that each batch row continues; negative is padding, which reads 0 and leaves the pool
            untouched.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            raise errors.ShapeError(
                f"Mamba.step: hidden_states has shape {tuple(hidden_states.shape)}, expected (batch, 1, d_model={self.d_model})"
            )
        x, z = apply_linear(self.in_proj, hidden_states.squeeze(1)).chunk(2, dim=-1)  # (batch, d_inner)
        x = self._convolve_one(x, conv_state, state_indices)
        dt, B, C = apply_linear(self.x_proj, x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, delta_bias = self._delta(dt)
        y = selective_state_update(
            ssm_state,
            x,
            delta,
            self.A(),
            B,
            C,
            self.D,
            z,
            delta_bias,
            dt_softplus=True,
            state_batch_indices=state_indices,
        )
        return apply_linear(self.out_proj, y).unsqueeze(1), conv_state, ssm_state

    def A(self) -> Tensor:
        """-exp(A_log) (d_inner, d_state), fp32 (fp64 for fp64); without gradients made once, kept until A_log changes.

        An edit through `A_log.data` leaves no trace that could be seen here: follow it with `.eval()` or `.train()`.
        """
        A_log = self.A_log
        if torch.compiler.is_compiling():
            return -torch.exp(A_log.to(compute_dtype(A_log.dtype)))
        wants_grad = torch.is_grad_enabled() and A_log.requires_grad
        if self._A_cache is not None and not wants_grad:
            source, version, A = self._A_cache
            # Of one storage, so of one address for as long as `source` is held, and not written since.
            if source.data_ptr() == A_log.data_ptr() and version == _version(A_log):
                return A
        self._warn_if_half()
        A = -torch.exp(A_log.to(compute_dtype(A_log.dtype)))
        if not wants_grad and _version(A_log) is not None:
            self._A_cache = (A_log.detach(), A_log._version, A)
        return A

    def allocate_inference_cache(
        self,
        batch_size: int,
        max_seqlen: int = 0,
        dtype: torch.dtype | None = None,
        *,
        ssm_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Zero states (conv_state (batch, d_inner, d_conv), ssm_state (batch, d_inner, d_state)) of this layer.

        dtype: of conv_state, that of the convolution's weight if None. ssm_dtype: fp32 (fp64 for fp64) if None.
        max_seqlen is mamba_ssm's argument; a state has no length.
        """
        weight = self.conv1d.weight
        dtype = dtype or weight.dtype
        conv_state = torch.zeros(batch_size, self.d_inner, self.d_conv, device=weight.device, dtype=dtype)
        ssm_dtype = ssm_dtype or compute_dtype(dtype)
        ssm_state = torch.zeros(batch_size, self.d_inner, self.d_state, device=weight.device, dtype=ssm_dtype)
        return conv_state, ssm_state

    def _warn_if_half(self) -> None:
        if self.keep_fp32:
            for t in (self.A_log, self.D, getattr(self.dt_proj, "bias", None)):
                if t is not None and t.dtype in _HALF:
                    _warn_half_precision(t.dtype)

    def __setattr__(self, name: str, value) -> None:
        if name == "A_log":
            # FSDP2 fills the gathered parameter again and again, at one address and without a new version. It sets it each time.
            self.__dict__["_A_cache"] = None
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Mamba:
        self._A_cache = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> Mamba:
        if not self.keep_fp32:
            return super()._apply(fn, recurse)
        kept = [p for p in (self.A_log, self.D, getattr(self.dt_proj, "bias", None)) if p is not None]
        kept += [p.grad for p in kept if p.grad is not None]

        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype in _HALF and any(t is p for p in kept):
                return t.detach().to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep, recurse)

    def _trains_fused(self, xz: Tensor) -> bool:
        """Whether gradients are wanted and every layer that `mamba_inner` stands for is plain, in the forms that it serves."""
        if not (self.use_fast_path and torch.is_grad_enabled()):
            return False
        layers = (self.x_proj, self.dt_proj, self.out_proj)
        if not (all(is_plain(layer, nn.Linear) for layer in layers) and is_plain(self.conv1d, nn.Conv1d)):
            return False
        if self.x_proj.bias is not None:
            return False
        parameters = (self.A_log, self.D, self.conv1d.weight, self.conv1d.bias, *(t for m in layers for t in (m.weight, m.bias)))
        return xz.requires_grad or any(p is not None and p.requires_grad for p in parameters)

    def _convolve(self, x: Tensor, conv_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """silu(conv1d(x)) of x (batch, d_inner, seqlen), on the inputs that conv_state holds, or zeros."""
        if is_plain(self.conv1d, nn.Conv1d):
            return causal_conv1d(
                x,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                initial_states=None if conv_state is None else conv_state[:, :, 1:],
                activation=self.activation,
                cu_seqlens=cu_seqlens,
            )
        # The layer's own forward counts. It pads d_conv - 1 zeros at both ends: its outputs from the first new input on are ours.
        if cu_seqlens is None:
            full = x if conv_state is None else torch.cat([conv_state[:, :, 1:].to(x.dtype), x], dim=2)
            begin = full.shape[2] - x.shape[2]
            return F.silu(self.conv1d(full)[:, :, begin : begin + x.shape[2]]) if x.shape[2] else x
        bounds = cu_seqlens.tolist()
        pieces = [
            self._convolve(x[:, :, begin:end], None if conv_state is None else conv_state[i : i + 1], None)
            for i, (begin, end) in enumerate(zip(bounds, bounds[1:]))
        ]
        return torch.cat([*pieces, torch.zeros_like(x[:, :, bounds[-1] :])], dim=2)

    def _convolve_one(self, x: Tensor, conv_state: Tensor, state_indices: Tensor | None) -> Tensor:
        """The same for one input (batch, d_inner), which conv_state takes in, in place."""
        if is_plain(self.conv1d, nn.Conv1d):
            weight = self.conv1d.weight.squeeze(1)
            return causal_conv1d_update(x, conv_state, weight, self.conv1d.bias, self.activation, conv_state_indices=state_indices)
        taken = slice(None) if state_indices is None else state_indices >= 0
        rows = taken if state_indices is None else state_indices[taken].long()
        with torch.no_grad():
            conv_state[rows] = torch.cat([conv_state[rows][:, :, 1:], x[taken, :, None].to(conv_state.dtype)], dim=2)
        y = torch.zeros_like(x)
        y[taken] = F.silu(self.conv1d(conv_state[rows].to(x.dtype))[:, :, self.d_conv - 1]).to(x.dtype)
        return y

    @staticmethod
    @torch.no_grad()
    def _keep_state(state, conv_state: Tensor, x: Tensor, last_state: Tensor, cu_seqlens: Tensor | None) -> None:
        state[0].copy_(_last_inputs(conv_state, x, cu_seqlens))
        state[1].copy_(last_state)

    def _delta(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """dt (..., dt_rank) -> delta (..., d_inner), and the bias that is still to be added, in fp32, by the scan."""
        if is_plain(self.dt_proj, nn.Linear):
            return linear(dt, self.dt_proj.weight), self.dt_proj.bias
        return self.dt_proj(dt), None  # an adapter, a hook: its own forward counts

    def _check_state(self, state: tuple[Tensor, Tensor], rows: int) -> None:
        expected = ((rows, self.d_inner, self.d_conv), (rows, self.d_inner, self.d_state))
        for name, letters, t, shape in zip(("conv_state", "ssm_state"), ("d_conv", "d_state"), state, expected):
            if tuple(t.shape) != shape:
                raise errors.ShapeError(
                    f"Mamba: {name} has shape {tuple(t.shape)}, expected (batch={rows}, d_inner={self.d_inner}, "
                    f"{letters}={shape[2]}); batch comes from hidden_states (or cu_seqlens), the others from the module"
                )

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise errors.ArgumentError("Mamba: layer_idx is None, expected an int; inference_params finds states by it")
        cached = inference_params.key_value_memory_dict
        if self.layer_idx not in cached:
            cached[self.layer_idx] = self.allocate_inference_cache(batch_size)
        elif initialize_states:
            for t in cached[self.layer_idx]:
                t.zero_()
        return cached[self.layer_idx]


def _version(t: Tensor) -> int | None:
    """How often `t` was written in place; None for an inference tensor, which does not count."""
    return None if t.is_inference() else t._version


def _last_inputs(conv_state: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last d_conv columns of cat(conv_state, x), per sequence: (batch | num_seqs, d_inner, d_conv).

    conv_state (batch | num_seqs, d_inner, d_conv) before x (batch, d_inner, seqlen).
    """
    width = conv_state.shape[-1]
    if cu_seqlens is None:
        if x.shape[-1] >= width:
            return x[:, :, -width:]
        return torch.cat([conv_state, x], dim=-1)[:, :, -width:]
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    # Column j of the answer is column length + j of the cat: from the old state while that is below width.
    column = (ends - starts)[:, None] + torch.arange(width, device=x.device)  # (num_seqs, width)
    old = conv_state.gather(2, column.clamp(max=width - 1)[:, None].expand_as(conv_state))
    if x.shape[-1] == 0:
        return old
    position = (starts[:, None] + column - width).clamp(0, x.shape[-1] - 1)
    new = x[0].transpose(0, 1)[position].transpose(1, 2)  # (num_seqs, d_inner, width)
    return torch.where((column < width)[:, None], old, new.to(old.dtype))


class Block(nn.Module):
    """Add, norm, mix: the residual stream runs beside the hidden states, so that adding and norming are one kernel.

    `fused_add_norm` asks for that kernel, for RMSNorm and LayerNorm alike; without it the sum is rounded to the dtype
    of the stream before the norm reads it. `residual_in_fp32` keeps the stream in fp32.
    """

    def __init__(self, dim: int, mixer_cls, norm_cls=nn.LayerNorm, fused_add_norm: bool = False, residual_in_fp32: bool = False):
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.mixer = mixer_cls(dim)
        self.norm = norm_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, residual (batch, seqlen, dim) -> (hidden_states, residual); mixer_kwargs go to the mixer."""
        hidden_states, residual = add_norm(
            self.norm, hidden_states, residual, fused=self.fused_add_norm, residual_in_fp32=self.residual_in_fp32
        )
        return self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs), residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 0, dtype=None, **kwargs) -> tuple[Tensor, Tensor]:
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor | None, *, fused: bool, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """s = x + residual; returns (norm(s), s), s in the dtype of the residual stream. `norm`: RMSNorm or LayerNorm."""
    if fused:
        is_rms_norm = isinstance(norm, RMSNorm)
        return rms_norm(x, norm.weight, norm.bias, residual, True, residual_in_fp32, norm.eps, is_rms_norm=is_rms_norm)
    residual = x if residual is None else x + residual
    x = norm(residual.to(norm.weight.dtype))
    return x, residual.to(compute_dtype(residual.dtype)) if residual_in_fp32 else residual
