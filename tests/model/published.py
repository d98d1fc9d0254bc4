"""What published files hold, names and shapes written down from their sources, and plain torch that runs such weights.

Official checkpoint: Cobra's run directory. Towers: timm 0.9.10 (VisionTransformer), open_clip (CLIP's visual).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def official_lm(d_model: int, n_layer: int, vocab: int, d_state: int = 16, d_conv: int = 4) -> dict[str, tuple[int, ...]]:
    """llm_backbone of a latest-checkpoint.pt; vocab: padded."""
    inner, rank = 2 * d_model, math.ceil(d_model / 16)
    shapes = {"llm.backbone.embedding.weight": (vocab, d_model)}
    for i in range(n_layer):
        mixer = f"llm.backbone.layers.{i}.mixer."
        shapes |= {
            mixer + "A_log": (inner, d_state),
            mixer + "D": (inner,),
            mixer + "in_proj.weight": (2 * inner, d_model),
            mixer + "conv1d.weight": (inner, 1, d_conv),
            mixer + "conv1d.bias": (inner,),
            mixer + "x_proj.weight": (rank + 2 * d_state, inner),
            mixer + "dt_proj.weight": (inner, rank),
            mixer + "dt_proj.bias": (inner,),
            mixer + "out_proj.weight": (d_model, inner),
            f"llm.backbone.layers.{i}.norm.weight": (d_model,),
        }
    return shapes | {"llm.backbone.norm_f.weight": (d_model,), "llm.lm_head.weight": (vocab, d_model)}


def official_projector(vision: int, d_model: int) -> dict[str, tuple[int, ...]]:
    """fused-gelu-mlp"""
    sizes = {0: (4 * vision, vision), 2: (d_model, 4 * vision), 4: (d_model, d_model)}
    return {f"projector.{i}.{p}": shape if p == "weight" else shape[:1] for i, shape in sizes.items() for p in ("weight", "bias")}


def timm_vit(
    width: int, depth: int, mlp: int, patch: int, positions: int, *, registers: int = 0, kind: str = "siglip", prefix: str = ""
) -> dict[str, tuple[int, ...]]:
    """timm's VisionTransformer of all `depth` blocks; positions: rows of pos_embed."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, positions, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    if kind != "clip":
        shapes["patch_embed.proj.bias"] = (width,)
    else:
        shapes |= {"norm_pre.weight": (width,), "norm_pre.bias": (width,), "head.weight": (width // 2, width)}
    if kind != "siglip":
        shapes["cls_token"] = (1, 1, width)
    if registers:
        shapes["reg_token"] = (1, registers, width)
    sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
    for i in range(depth):
        block = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, shape in sizes.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        if kind == "dinov2":
            shapes |= {f"{block}ls1.gamma": (width,), f"{block}ls2.gamma": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    if kind == "siglip":
        shapes |= {
            "attn_pool.latent": (1, 1, width), "attn_pool.q.weight": (width, width), "attn_pool.q.bias": (width,),
            "attn_pool.kv.weight": (2 * width, width), "attn_pool.kv.bias": (2 * width,), "attn_pool.proj.weight": (width, width),
            "attn_pool.proj.bias": (width,), "attn_pool.norm.weight": (width,), "attn_pool.norm.bias": (width,),
            "attn_pool.mlp.fc1.weight": (mlp, width), "attn_pool.mlp.fc1.bias": (mlp,),
            "attn_pool.mlp.fc2.weight": (width, mlp), "attn_pool.mlp.fc2.bias": (width,),
        }  # fmt: skip
    return {prefix + name: shape for name, shape in shapes.items()}


TEXT_TOWER = {"text.positional_embedding": (64, 8), "text.token_embedding.weight": (32, 8), "logit_scale": (), "logit_bias": ()}


def open_clip_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's visual tower, timm's names -> those of open_clip."""
    words = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1", "norm_pre": "ln_pre",
        "blocks.": "transformer.resblocks.", "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2",
    }  # fmt: skip
    renamed = {}
    for name, tensor in weights.items():
        if name in ("norm.weight", "norm.bias"):
            name = f"ln_post.{name[5:]}"
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        if name == "head.weight":
            name, tensor = "proj", tensor.mT.contiguous()
        if name in ("class_embedding", "positional_embedding"):
            tensor = tensor.squeeze()
        renamed[f"visual.{name}"] = tensor
    return renamed | {"positional_embedding": torch.ones(77, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}


def fill(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Weights in which no term is negligible, in fp32."""
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        if name.endswith("dt_proj.bias"):
            weights[name] = noise - 3
        elif name.endswith("A_log"):
            weights[name] = torch.log(torch.arange(1.0, shape[1] + 1)).repeat(shape[0], 1) + 0.3 * noise
        elif "norm" in name and name.endswith("weight") or name.endswith((".D", "gamma")):
            weights[name] = 1 + 0.3 * noise
        elif len(shape) > 1 and "embed" not in name and "token" not in name or "patch_embed" in name:
            weights[name] = 0.7 * noise / math.prod(shape[1:]) ** 0.5
        else:
            weights[name] = 0.3 * noise
    if "llm.lm_head.weight" in weights:
        weights["llm.lm_head.weight"] = weights["llm.backbone.embedding.weight"] = weights["llm.backbone.embedding.weight"] * 3
    return weights


def run_timm_vit(w: dict[str, torch.Tensor], pixels: torch.Tensor, heads: int, blocks: int, grid: int) -> torch.Tensor:
    """Features of the given number of blocks, prefix tokens dropped: what upstream's monkey-patched forward returns.

    pixels (batch, 3, px, px) -> (batch, grid * grid, width). A class token with a place in pos_embed, or with none (DINOv2).
    """
    clip = "norm_pre.weight" in w
    eps, width = 1e-5 if clip else 1e-6, w["pos_embed"].shape[-1]
    patch = w["patch_embed.proj.weight"]
    x = F.conv2d(pixels, patch, w.get("patch_embed.proj.bias"), stride=patch.shape[-1]).flatten(2).mT
    positions = w["pos_embed"]
    if "cls_token" in w and math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + positions
    else:
        side = math.isqrt(positions.shape[1])
        square = positions.reshape(1, side, side, width).permute(0, 3, 1, 2)
        if side != grid:
            square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=True)
        x = x + square.flatten(2).mT
        x = torch.cat([*(w[t].expand(len(x), -1, -1) for t in ("cls_token", "reg_token") if t in w), x], 1)

    def norm(name, x):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    if clip:
        x = norm("norm_pre", x)
    for i in range(blocks):
        b = f"blocks.{i}."
        qkv = linear(b + "attn.qkv", norm(b + "norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.mT / math.sqrt(width // heads), -1) @ v
        x = x + linear(b + "attn.proj", y.transpose(1, 2).reshape(x.shape)) * w.get(b + "ls1.gamma", 1)
        y = linear(b + "mlp.fc1", norm(b + "norm2", x))
        y = y * torch.sigmoid(1.702 * y) if clip else F.gelu(y)
        x = x + linear(b + "mlp.fc2", y) * w.get(b + "ls2.gamma", 1)
    return x[:, x.shape[1] - grid * grid :]
