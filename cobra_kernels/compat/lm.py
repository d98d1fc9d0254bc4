"""The language model as mamba_ssm's callers build, load and save it; all arithmetic is that of cobra_kernels.modules.lm."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cobra_kernels import errors
from cobra_kernels.modules import lm, mamba, pretrained

from .generation import GenerationMixin
from .norms import RMSNorm

CONFIG, WEIGHTS, SAFE_WEIGHTS = "config.json", "pytorch_model.bin", "model.safetensors"


@dataclass
class MambaConfig(lm.MambaConfig):
    """With the fields of mamba_ssm 2.x, which must say that Mamba-1 is all there is."""

    d_intermediate: int = 0
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        plain = lm.MambaConfig.from_dict(vars(self))  # which knows what these fields may say
        self.ssm_cfg = plain.ssm_cfg


class Block(mamba.Block):
    """mamba_ssm 2.x's: what mlp_cls makes, unless it is nn.Identity, is a second branch behind the mixer, with a norm of its own."""

    def __init__(self, dim, mixer_cls, mlp_cls, norm_cls=nn.LayerNorm, fused_add_norm=False, residual_in_fp32=False):
        super().__init__(dim, mixer_cls, norm_cls, fused_add_norm, residual_in_fp32)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)

    def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
        """hidden_states, residual (batch, seqlen, dim) -> (hidden_states, residual); mixer_kwargs go to the mixer."""
        hidden_states, residual = super().forward(hidden_states, residual, inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = mamba.add_norm(
                self.norm2, hidden_states, residual, fused=self.fused_add_norm, residual_in_fp32=self.residual_in_fp32
            )
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def _named_as_upstream(model: nn.Module) -> None:
    """Gives the parts of a language model the classes by which mamba_ssm's callers know them; each does what the one it replaces does."""
    for part in model.modules():
        if type(part) is lm.MixerModel:
            part.__class__ = MixerModel
        elif type(part) is mamba.Block:
            part.__class__, part.mlp, part.layer_idx = Block, None, part.mixer.layer_idx
        elif type(part) is mamba.RMSNorm:
            part.__class__, part.drop = RMSNorm, None


def _config(d_model, n_layer, vocab_size, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, **options) -> MambaConfig:
    return MambaConfig(
        d_model, n_layer, vocab_size, dict(ssm_cfg or {}), pad_vocab_size_multiple=1, d_intermediate=d_intermediate,
        attn_layer_idx=attn_layer_idx or [], attn_cfg=attn_cfg or {}, **options,
    )  # fmt: skip


def create_block(
    d_model, d_intermediate=0, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-5, rms_norm=False, residual_in_fp32=False,
    fused_add_norm=False, layer_idx=None, device=None, dtype=None,
):  # fmt: skip
    """A block of mamba_ssm 2.x's signature. By keyword, as both versions call it, it serves 1.x too."""
    config = _config(
        d_model, 1, 1, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon=norm_epsilon, rms_norm=rms_norm,
        residual_in_fp32=residual_in_fp32, fused_add_norm=fused_add_norm,
    )  # fmt: skip
    block = lm.create_block(config, layer_idx, device, dtype)
    _named_as_upstream(block)
    return block


class MixerModel(lm.MixerModel):
    """mamba_ssm's constructor, of 1.x (d_model, n_layer, vocab_size, ..) and of 2.x (d_model, n_layer, d_intermediate, vocab_size, ..)."""

    def __init__(
        self, d_model, n_layer, d_intermediate=0, vocab_size=None, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-5,
        rms_norm=False, initializer_cfg=None, fused_add_norm=False, residual_in_fp32=False, device=None, dtype=None,
    ):  # fmt: skip
        if vocab_size is None:  # 1.x, by position
            d_intermediate, vocab_size = 0, d_intermediate
        config = _config(
            d_model, n_layer, vocab_size, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon=norm_epsilon, rms_norm=rms_norm,
            residual_in_fp32=residual_in_fp32, fused_add_norm=fused_add_norm,
        )  # fmt: skip
        super().__init__(config, initializer_cfg, device, dtype)
        _named_as_upstream(self)


class MambaLMHeadModel(lm.MambaLMHeadModel, GenerationMixin):
    """The language model with mamba_ssm's from_pretrained, save_pretrained and generate."""

    def __init__(self, config: lm.MambaConfig, initializer_cfg: dict[str, Any] | None = None, device=None, dtype=None):
        super().__init__(config, initializer_cfg, device, dtype)
        _named_as_upstream(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | Path, device=None, dtype: torch.dtype | None = None, **kwargs
    ) -> MambaLMHeadModel:
        """A model of a folder that mamba_ssm or transformers has written, or of such a repository's name.

        Weights are read without running any code of the file. Raises ArgumentError for a bad config, wrong or missing keys.
        """
        folder = _folder(pretrained_model_name)
        config = pretrained.read_config(folder, MambaConfig)
        model = cls(config, device="meta", dtype=dtype, **kwargs)
        weights = pretrained.read_weights(folder, config, device, dtype)
        model.load_state_dict(weights, strict=False, assign=True)  # strict by read_weights; only the tied head is left out
        model.tie_weights()
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """config.json and pytorch_model.bin, as mamba_ssm writes and reads them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / WEIGHTS)
        values = {f.name: getattr(self.config, f.name) for f in fields(lm.MambaConfig)}
        if self.config.norm_epsilon == lm.MambaConfig.norm_epsilon:
            del values["norm_epsilon"]  # mamba_ssm knows no other, and refuses the key
        (folder / CONFIG).write_text(json.dumps(values, indent=4))


def _folder(model_name: str | Path) -> Path:
    """The folder with a model's files; of a repository, once they are in transformers' cache."""
    if Path(model_name).is_dir():
        return Path(model_name)
    folder = _file(model_name, CONFIG).parent
    if _file(model_name, SAFE_WEIGHTS, missing_ok=True) is None:
        if _file(model_name, pretrained.INDEX, missing_ok=True) is None:
            _file(model_name, WEIGHTS)
        else:
            for path in pretrained.weight_files(folder):
                _file(model_name, path.name)
    return folder


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """The dictionary in config.json."""
    return json.loads(_file(model_name, CONFIG).read_text())


def load_state_dict_hf(model_name: str | Path, device=None, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The weights by name, on `device`, float tensors in `dtype` if given (A_log, D and dt_proj.bias as they are)."""
    safe = _file(model_name, SAFE_WEIGHTS, missing_ok=True)
    if safe is not None:
        from safetensors.torch import load_file

        weights = load_file(safe)
    else:
        weights = torch.load(_file(model_name, WEIGHTS), map_location="cpu", weights_only=True, mmap=True)
    kept = ("A_log", ".D", "dt_proj.bias")
    return {name: t.to(device=device, dtype=None if name.endswith(kept) else dtype) for name, t in weights.items()}


def _file(model_name: str | Path, name: str, missing_ok: bool = False) -> Path | None:
    """A file of a folder, or of a repository through transformers: its cache, or the network where that is allowed."""
    if Path(model_name).is_dir():
        path = Path(model_name) / name
        if path.is_file():
            return path
        if missing_ok:
            return None
        raise errors.ArgumentError(f"from_pretrained: {model_name} has no {name}, expected it next to the other files")
    try:
        from transformers.utils import cached_file
    except ImportError as error:
        raise errors.ArgumentError(
            f"from_pretrained: {model_name} is no folder, and transformers, which fetches repositories, is not installed"
        ) from error
    found = cached_file(str(model_name), name, _raise_exceptions_for_missing_entries=not missing_ok)
    return None if found is None else Path(found)
