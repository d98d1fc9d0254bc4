"""The Mamba language model: embedding -> blocks -> norm -> head. `prefill` and `decode` are its only inference paths.

    logits, state = model.prefill(prompt)              # ids (batch, seqlen) or embeddings (batch, seqlen, d_model)
    logits = model.decode(tokens, state)               # tokens (batch,), one more each

Both write `state` in place, and `prefill` continues from the state that it is given, so a prompt may come in pieces.
Module and parameter names are those of mamba_ssm's `MambaLMHeadModel`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra_kernels import errors
from cobra_kernels.linear import apply_linear
from cobra_kernels.modules.mamba import Block, InferenceParams, Mamba, MambaState, RMSNorm, add_norm

# What a checkpoint's "ssm_cfg" may say, with the type of each value.
_SSM_KEYS = {
    "d_state": int,
    "d_conv": int,
    "expand": int,
    "dt_rank": (int, str),
    "dt_min": float,
    "dt_max": float,
    "dt_init": str,
    "dt_scale": float,
    "dt_init_floor": float,
    "conv_bias": bool,
    "bias": bool,
    "use_fast_path": bool,
    "keep_fp32": bool,
}


@dataclass
class MambaConfig:
    """Shape and options of a Mamba language model; the defaults are Mamba-2.8B. Bad values raise `ArgumentError`."""

    d_model: int = 2560
    n_layer: int = 64
    vocab_size: int = 50277  # tokens of the tokenizer; the embedding is padded to a multiple of pad_vocab_size_multiple
    ssm_cfg: dict[str, Any] = field(default_factory=dict)  # keyword arguments of Mamba
    rms_norm: bool = True  # False: LayerNorm
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise errors.ArgumentError(f"MambaConfig: {name} has {value!r}, expected an int >= 1")
        for name in ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise errors.ArgumentError(f"MambaConfig: {name} has {value!r}, expected a bool")
        if not isinstance(self.norm_epsilon, (int, float)) or not 0 <= self.norm_epsilon < 1:
            raise errors.ArgumentError(f"MambaConfig: norm_epsilon has {self.norm_epsilon!r}, expected a float in [0, 1)")
        if not isinstance(self.ssm_cfg, Mapping):
            raise errors.ArgumentError(f"MambaConfig: ssm_cfg has {self.ssm_cfg!r}, expected a dict")
        for key, value in self.ssm_cfg.items():
            if key not in _SSM_KEYS:
                raise errors.ArgumentError(f"MambaConfig: ssm_cfg has the key {key!r}, expected one of {', '.join(_SSM_KEYS)}")
            kind = _SSM_KEYS[key]
            is_kind = isinstance(value, (int, float) if kind is float else kind)
            if not is_kind or (isinstance(value, bool) and kind is not bool):
                raise errors.ArgumentError(f"MambaConfig: ssm_cfg[{key!r}] has {value!r}, expected {kind}")
            if type(value) is int and value < 1 or type(value) is float and not (0 < value < math.inf):
                raise errors.ArgumentError(f"MambaConfig: ssm_cfg[{key!r}] has {value!r}, expected a finite value above 0")
            if key == "dt_rank" and isinstance(value, str) and value != "auto":
                raise errors.ArgumentError(f"MambaConfig: ssm_cfg['dt_rank'] has {value!r}, expected an int or 'auto'")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MambaConfig:
        """Read a mamba_ssm `config.json`. Foreign keys are refused, unless they say that Mamba-1 is all there is."""
        values = dict(values)
        for key in ("d_intermediate", "attn_layer_idx", "attn_cfg"):
            if values.pop(key, None):
                raise errors.ArgumentError(f"MambaConfig: {key} is set, expected nothing: only pure Mamba-1 models are built")
        ssm_cfg = values.get("ssm_cfg", {})
        if isinstance(ssm_cfg, Mapping):
            values["ssm_cfg"] = {key: value for key, value in ssm_cfg.items() if key != "layer"}
            if ssm_cfg.get("layer", "Mamba1") != "Mamba1":
                raise errors.ArgumentError(f"MambaConfig: ssm_cfg['layer'] has {ssm_cfg['layer']!r}, expected 'Mamba1'")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise errors.ArgumentError(f"MambaConfig: has the keys {', '.join(unknown)}, expected only {', '.join(known)}")
        return cls(**values)


class CausalLMOutput(NamedTuple):
    """What `MambaLMHeadModel.forward` returns."""

    logits: Tensor  # (batch, seqlen, padded vocab), or the last num_last_tokens of seqlen


def create_block(config: MambaConfig, layer_idx: int, device=None, dtype=None) -> Block:
    norm_cls = RMSNorm if config.rms_norm else nn.LayerNorm
    return Block(
        config.d_model,
        partial(Mamba, layer_idx=layer_idx, device=device, dtype=dtype, **config.ssm_cfg),
        partial(norm_cls, eps=config.norm_epsilon, device=device, dtype=dtype),
        fused_add_norm=config.fused_add_norm,
        residual_in_fp32=config.residual_in_fp32,
    )


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initialise one module, for `Module.apply`. Residual branches start 1/sqrt(their number) smaller, as in GPT-2."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, p in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                with torch.no_grad():
                    p /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """embedding -> n_layer blocks -> final norm."""

    def __init__(self, config: MambaConfig, initializer_cfg: dict[str, Any] | None = None, device=None, dtype=None):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.fused_add_norm = config.fused_add_norm
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(create_block(config, i, device, dtype) for i in range(config.n_layer))
        norm_cls = RMSNorm if config.rms_norm else nn.LayerNorm
        self.norm_f = norm_cls(config.d_model, eps=config.norm_epsilon, device=device, dtype=dtype)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 0, dtype=None, **kwargs) -> dict:
        """{layer: (conv_state, ssm_state)}, as mamba_ssm keeps them; `allocate_state` is the same as one object."""
        return {i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs) for i, layer in enumerate(self.layers)}

    def forward(
        self,
        input_ids: Tensor | None,
        inference_params: InferenceParams | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        state: MambaState | None = None,
        cu_seqlens: Tensor | None = None,
        state_indices: Tensor | None = None,
    ) -> Tensor:
        """input_ids (batch, seqlen) int, or inputs_embeds (batch, seqlen, d_model) -> (batch, seqlen, d_model).

        state, **written in place**, cu_seqlens and state_indices: as in `Mamba.forward`, for all layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise errors.ArgumentError("MixerModel: input_ids and inputs_embeds are both given or both None, expected one of them")
        if state is not None and len(state) != len(self.layers):
            raise errors.ShapeError(f"MixerModel: state has {len(state)} layers, expected n_layer={len(self.layers)}")
        hidden_states, residual = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds, None
        for i, layer in enumerate(self.layers):
            hidden_states, residual = layer(
                hidden_states,
                residual,
                inference_params,
                state=None if state is None else state[i],
                cu_seqlens=cu_seqlens,
                state_indices=state_indices,
            )
        return add_norm(self.norm_f, hidden_states, residual, fused=self.fused_add_norm, residual_in_fp32=self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module):
    """A Mamba language model. `config.vocab_size` tokens are real; logits have `config.padded_vocab_size` columns."""

    def __init__(self, config: MambaConfig, initializer_cfg: dict[str, Any] | None = None, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.backbone = MixerModel(config, initializer_cfg, device, dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device=None, dtype: torch.dtype | None = None) -> MambaLMHeadModel:
        """A model, in eval mode, of a folder that mamba_ssm or transformers has written; nothing is downloaded.

        device: where it goes, the CPU if None. dtype: of the weights, as stored if None; `A_log`, `D` and `dt_proj.bias` are
        fp32 anyway. Raises `ArgumentError` for a config that is no Mamba-1, and lists what is missing, unexpected or of a wrong
        shape; see `cobra_kernels.modules.pretrained` for the files.
        """
        from cobra_kernels.modules import pretrained

        folder = Path(folder)
        config = pretrained.read_config(folder)
        weights = pretrained.read_weights(folder, config, device, dtype)
        model = cls(config, device="meta")
        model.load_state_dict(weights, strict=False, assign=True)  # strict by read_weights; only the tied head is left out
        model.tie_weights()
        return model.eval()

    def _apply(self, fn, recurse: bool = True) -> MambaLMHeadModel:
        super()._apply(fn, recurse)
        self.tie_weights()  # moving off the meta device makes a new parameter for each of the two names
        return self

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 0, dtype=None, **kwargs) -> dict:
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def allocate_state(self, batch_size: int, dtype: torch.dtype | None = None, *, ssm_dtype: torch.dtype | None = None) -> MambaState:
        """The state before the first token, zeros. dtype: of activations, None: the weights'; ssm_dtype: None: fp32."""
        layers = self.allocate_inference_cache(batch_size, dtype=dtype, ssm_dtype=ssm_dtype)
        conv, ssm = zip(*layers.values())
        return MambaState(list(conv), list(ssm))

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        *,
        inputs_embeds: Tensor | None = None,
        state: MambaState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> CausalLMOutput:
        """input_ids (batch, seqlen) or inputs_embeds (batch, seqlen, d_model) -> logits of every position, or the last
        few.

        position_ids is mamba_ssm's argument, and unused there too: a recurrence knows its position. state, **written in
        place**, and cu_seqlens: as in `Mamba.forward`.
        """
        hidden_states = self.backbone(input_ids, inference_params, inputs_embeds=inputs_embeds, state=state, cu_seqlens=cu_seqlens)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(apply_linear(self.lm_head, hidden_states))

    @torch.no_grad()
    def prefill(
        self,
        prompt: Tensor,
        state: MambaState | None = None,
        *,
        lengths: Tensor | list[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """Read a prompt; returns (logits of each row's last token (batch, padded vocab), state).

        prompt: ids (batch, seqlen) int, or embeddings (batch, seqlen, d_model); seqlen >= 1.
        state: what was read before, continued from and **written in place**; None: a new one, of zeros.
        lengths: (batch,) tokens of each row, the rest of the row is padding. attention_mask: (batch, seqlen), 0 or
            False where padding is, on either side. A padded batch is packed: padding costs nothing and reaches nothing,
            and every row ends as if it had been alone.
        """
        is_ids = not prompt.is_floating_point()
        if prompt.dim() != (2 if is_ids else 3):
            raise errors.ShapeError(
                f"prefill: prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}, expected ids "
                "(batch, seqlen) or embeddings (batch, seqlen, d_model)"
            )
        batch = prompt.shape[0]
        if state is None:
            state = self.allocate_state(batch, None if is_ids else prompt.dtype)
        elif state.batch_size != batch:
            raise errors.ShapeError(f"prefill: state has batch {state.batch_size}, expected batch={batch}; batch comes from the prompt")
        mask = _padding_mask(prompt, lengths, attention_mask)
        cu_seqlens, last = None, -1
        if mask is not None:
            rows = mask.sum(dim=1)
            cu_seqlens = F.pad(rows.cumsum(0), (1, 0)).to(torch.int32)
            prompt, last = prompt[mask].unsqueeze(0), cu_seqlens[1:].long() - 1  # (1, total[, d_model])
        ids, embeds = (prompt, None) if is_ids else (None, prompt)
        hidden_states = self.backbone(ids, inputs_embeds=embeds, state=state, cu_seqlens=cu_seqlens)
        hidden_states = hidden_states[:, last] if mask is None else hidden_states[0, last]
        return apply_linear(self.lm_head, hidden_states), state

    @torch.no_grad()
    def decode(self, input_ids: Tensor, state: MambaState, *, rows: Tensor | None = None) -> Tensor:
        """Read one more token a row: input_ids (batch,) int -> logits (batch, padded vocab); writes `state` **in
        place**.

        rows: (batch,) int, the rows of the state that the tokens belong to, each at most once; negative is padding.
            None: all.
        """
        if input_ids.dim() != 1:
            raise errors.ShapeError(f"decode: input_ids has shape {tuple(input_ids.shape)}, expected (batch,)")
        if rows is not None and rows.shape != input_ids.shape:
            raise errors.ShapeError(
                f"decode: rows has shape {tuple(rows.shape)}, expected (batch={input_ids.shape[0]},); batch comes from input_ids"
            )
        hidden_states = self.backbone(input_ids[:, None], state=state, state_indices=rows)
        return apply_linear(self.lm_head, hidden_states[:, 0])


def _padding_mask(prompt: Tensor, lengths: Tensor | list[int] | None, attention_mask: Tensor | None) -> Tensor | None:
    """(batch, seqlen) bool, True at tokens; None when there is no padding at all."""
    batch, seqlen = prompt.shape[:2]
    if lengths is not None and attention_mask is not None:
        raise errors.ArgumentError("prefill: lengths and attention_mask are both given, expected at most one")
    if seqlen == 0:
        raise errors.ShapeError(f"prefill: prompt has shape {tuple(prompt.shape)}, expected seqlen >= 1")
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=prompt.device)
        if lengths.shape != (batch,):
            raise errors.ShapeError(
                f"prefill: lengths has shape {tuple(lengths.shape)}, expected (batch={batch},); batch comes from the prompt"
            )
        if batch and not bool(((lengths >= 1) & (lengths <= seqlen)).all()):
            raise errors.ArgumentError(
                f"prefill: lengths has {lengths.tolist()}, expected values in 1..seqlen={seqlen}; seqlen comes from the prompt"
            )
        mask = torch.arange(seqlen, device=prompt.device) < lengths[:, None]
    elif attention_mask is not None:
        if attention_mask.shape != (batch, seqlen):
            raise errors.ShapeError(
                f"prefill: attention_mask has shape {tuple(attention_mask.shape)}, expected (batch={batch}, "
                f"seqlen={seqlen}); both come from the prompt"
            )
        mask = attention_mask.to(torch.bool)
        if not bool(mask.any(dim=1).all()):
            raise errors.ArgumentError("prefill: attention_mask has a row of zeros alone, expected a token in every row")
    else:
        return None
    return None if bool(mask.all()) else mask
