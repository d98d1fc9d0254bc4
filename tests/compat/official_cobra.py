"""What the official Cobra repository builds on mamba_ssm, in our own few lines: its structure, parameter names and imports.

Only the towers are missing: they are handed in. Imported with the shims installed, so that mamba_ssm and causal_conv1d are ours.
Structure as published at github.com/h-zhao1997/cobra (MIT), cobra/models/mamba/modeling_mamba.py and cobra/models/vlms/cobra.py.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # noqa: F401
from mamba_ssm.models.mixer_seq_simple import _init_weights
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn  # noqa: F401
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.triton.selective_state_update import _selective_scan_update_kernel, selective_state_update  # noqa: F401
from mamba_ssm.utils.generation import InferenceParams, modify_logit_for_repetition_penalty, sample, update_graph_cache
from torch import nn

IGNORE_INDEX = -100


def add_norm(norm, hidden, residual, prenorm):
    """(norm(hidden + residual), the sum in fp32), by the fused functions."""
    fused = rms_norm_fn if isinstance(norm, RMSNorm) else layer_norm_fn
    return fused(hidden, norm.weight, norm.bias, residual=residual, prenorm=prenorm, residual_in_fp32=True, eps=norm.eps)


class Block(nn.Module):
    def __init__(self, dim, layer_idx, ssm_cfg, eps):
        super().__init__()
        self.mixer = Mamba(dim, layer_idx=layer_idx, **ssm_cfg, device=None, dtype=None)
        self.norm = RMSNorm(dim, eps=eps, device=None, dtype=None)
        assert isinstance(self.norm, (nn.LayerNorm, RMSNorm))

    def forward(self, hidden, residual=None, inference_params=None):
        hidden, residual = add_norm(self.norm, hidden, residual, True)
        return self.mixer(hidden, inference_params=inference_params), residual


class MambaModel(nn.Module):
    def __init__(self, d_model, n_layer, vocab_size, ssm_cfg, eps):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Block(d_model, i, ssm_cfg, eps) for i in range(n_layer))
        self.norm_f = RMSNorm(d_model, eps=eps)
        self.apply(partial(_init_weights, n_layer=n_layer, **{}))

    def forward(self, inputs_embeds, inference_params=None):
        hidden, residual = inputs_embeds, None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params)
        return add_norm(self.norm_f, hidden, residual, False)


class MambaForCausalLM(nn.Module):
    def __init__(self, d_model, n_layer, vocab_size, ssm_cfg, eps=1e-5, pad_vocab_size_multiple=8):
        super().__init__()
        vocab_size += -vocab_size % pad_vocab_size_multiple
        self.backbone = MambaModel(d_model, n_layer, vocab_size, ssm_cfg, eps)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
        return {
            i: layer.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype) for i, layer in enumerate(self.backbone.layers)
        }

    def forward(self, inputs_embeds, inference_params=None, num_last_tokens=0):
        hidden = self.backbone(inputs_embeds, inference_params)
        return self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens > 0 else hidden)


class LLMBackbone(nn.Module):
    """Its state_dict is a checkpoint's "llm_backbone"."""

    def __init__(self, **options):
        super().__init__()
        self.llm = MambaForCausalLM(**options)


class TokenDown(nn.Module):
    def forward(self, x):
        side = int(x.shape[1] ** 0.5)
        return nn.functional.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (side, side)), (14, 14)).flatten(2).transpose(1, 2)


class PosInject(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, bias=True, groups=dim))

    def forward(self, x):
        side = int(x.shape[1] ** 0.5)
        grid = x.transpose(1, 2).unflatten(2, (side, side))
        return (self.peg(grid) + grid).flatten(2).transpose(1, 2)


class Projector(nn.Module):
    """Its state_dict is a checkpoint's "projector"."""

    def __init__(self, kind, vision_dim, llm_dim):
        super().__init__()
        hidden = 4 * vision_dim if kind.startswith("fused") else llm_dim
        if kind == "linear":
            self.projector = nn.Linear(vision_dim, llm_dim)
            return
        parts = [nn.Linear(vision_dim, hidden), nn.GELU(), nn.Linear(hidden, llm_dim)]
        if kind.endswith("ldpnet"):
            parts += [TokenDown(), PosInject(llm_dim)]
        elif kind == "fused-gelu-mlp":
            parts += [nn.GELU(), nn.Linear(llm_dim, llm_dim)]
        self.projector = nn.Sequential(*parts)

    def forward(self, patches):
        return self.projector(patches)


class CobraVLM(nn.Module):
    """vision_backbone: pixels -> the features of each tower, (batch, patches, width)."""

    def __init__(self, vision_backbone, projector, llm_backbone):
        super().__init__()
        self.vision_backbone, self.projector, self.llm_backbone = vision_backbone, projector, llm_backbone

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.llm_backbone.llm.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)

    def forward(
        self, input_ids, attention_mask=None, pixel_values=None, labels=None, *, multimodal_indices=None, position_ids=None,
        inference_params=None, num_last_tokens=0,
    ):  # fmt: skip
        """(loss, logits). Rows with an image come out first: [patches ; text], then the others: [text ; zeros]."""
        text = self.llm_backbone.llm.backbone.embedding(input_ids)
        if pixel_values is not None:
            patches = self.projector(torch.cat(self.vision_backbone(pixel_values), dim=2))
            batch, count = len(input_ids), patches.shape[1]
            rows = list(range(batch)) if multimodal_indices is None else list(multimodal_indices)
            others = [row for row in range(batch) if row not in rows]
            text = torch.cat([
                torch.cat([patches, text[rows]], dim=1),
                torch.cat([text[others], text.new_zeros(len(others), count, text.shape[2])], dim=1),
            ])  # fmt: skip
            if labels is not None:
                none = torch.full((batch, count), IGNORE_INDEX)
                labels = torch.cat([
                    torch.cat([none[rows], labels[rows]], dim=1),
                    torch.cat([labels[others], none[others]], dim=1),
                ])  # fmt: skip
        logits = self.llm_backbone.llm(text, inference_params, num_last_tokens)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
        return SimpleNamespace(loss=loss, logits=logits)


@torch.inference_mode()
def decode(vlm, input_ids, pixel_values, max_new_tokens, use_cache, max_length=2000, repetition_penalty=1.0, vocab_size=None, **sampling):
    """(tokens (batch, prompt + new), logits of each step). A graph cache of max_length, or a state made in the first forward."""
    batch = len(input_ids)
    if use_cache:
        vlm._decoding_cache = update_graph_cache(vlm, getattr(vlm, "_decoding_cache", None), batch, input_ids.shape[1], max_length)
        params = vlm._decoding_cache.inference_params
        params.reset(max_length, batch)
    else:
        params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    sequences, tokens, scores = input_ids, input_ids, []
    while len(scores) < max_new_tokens:
        if params.seqlen_offset == 0:
            logits = vlm(tokens, pixel_values=pixel_values, inference_params=params, num_last_tokens=1).logits
        else:
            position_ids = torch.full((batch, 1), params.seqlen_offset)
            if use_cache:
                logits = vlm._decoding_cache.run(tokens, position_ids, params.seqlen_offset)
            else:
                logits = vlm(tokens, position_ids=position_ids, inference_params=params, num_last_tokens=1).logits
        scores.append(logits[:, 0, :vocab_size])
        params.seqlen_offset += tokens.shape[1]
        logits = modify_logit_for_repetition_penalty(scores[-1].clone(), sequences, repetition_penalty)
        tokens = sample(logits, **sampling)[:, None]
        sequences = torch.cat([sequences, tokens], dim=1)
    return sequences, torch.stack(scores, dim=1)
