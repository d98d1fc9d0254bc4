"""Towers: equal to a short ViT written here, and to the hidden states of transformers' whole models."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from cobra.config import PRESETS, VISION_BACKBONES, TowerConfig, VisionConfig
from cobra.vision import VisionBackbone, build_tower, resample_position_embedding
from cobra_kernels.errors import ArgumentError, ShapeError

# image_size is no multiple of patch_size: the last pixels must be ignored, as 384 = 27 * 14 + 6
TINY = {
    "dinov2": TowerConfig("dino", "dinov2", 32, 4, 4, 128, 45, 8, registers=4),
    "siglip": TowerConfig("siglip", "siglip", 32, 4, 4, 84, 45, 8),
    "clip": TowerConfig("clip", "clip", 32, 4, 4, 128, 45, 8),
    "in1k": TowerConfig("in1k", "in1k", 32, 4, 4, 128, 40, 8),
}


def tiny(*specs):
    return VisionConfig("tiny", specs)


def randomise(module, seed=0):
    """Weights in which no term is negligible: transformers starts biases, registers and class tokens near 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 1.0 if "embedding" in name or "token" in name else 0.3
            p.copy_(torch.randn(p.shape, generator=g) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


# --- the short ViT: plain torch on a dict of weights, one line a step -------------------------------------------------

NAMES = {  # what a step is called in each architecture
    "dinov2": {
        "patch": "embeddings.patch_embeddings.projection",
        "pos": "embeddings.position_embeddings",
        "cls": "embeddings.cls_token",
        "block": "encoder.layer.{}.",
        "norm1": "norm1",
        "norm2": "norm2",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
    },
    "siglip": {
        "patch": "embeddings.patch_embedding",
        "pos": "embeddings.position_embedding.weight",
        "cls": None,
        "block": "encoder.layers.{}.",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
    },
    "in1k": {
        "patch": "embeddings.patch_embeddings.projection",
        "pos": "embeddings.position_embeddings",
        "cls": "embeddings.cls_token",
        "block": "layers.{}.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
    },
}
NAMES["clip"] = {**NAMES["siglip"], "cls": "embeddings.class_embedding"}


def short_vit(spec, w, pixels):
    """Features of block depth - 2, prefix dropped. w: the weights by name; pixels (batch, 3, px, px)."""
    n, eps = NAMES[spec.kind], 1e-5 if spec.kind == "clip" else 1e-6
    batch, heads, grid = pixels.shape[0], spec.heads, spec.image_size // spec.patch_size
    p, dim = spec.patch_size, spec.width

    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        if spec.kind == "clip":
            return x * torch.sigmoid(1.702 * x)
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def split(x):
        return x.reshape(batch, -1, heads, dim // heads).transpose(1, 2)

    # cut into patches by hand: (batch, grid * grid, 3 * p * p)
    x = pixels[:, :, : grid * p, : grid * p].reshape(batch, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(batch, grid * grid, -1) @ w[n["patch"] + ".weight"].reshape(dim, -1).T
    x = x + w.get(n["patch"] + ".bias", 0)
    if n["cls"]:
        x = torch.cat([w[n["cls"]].reshape(1, 1, dim).expand(batch, 1, dim), x], 1)
    x = x + w[n["pos"]].reshape(1, -1, dim)
    if spec.kind == "dinov2":
        x = torch.cat([x[:, :1], w["embeddings.register_tokens"].expand(batch, -1, -1), x[:, 1:]], 1)
    if spec.kind == "clip":
        x = norm("pre_layrnorm", x)
    for i in range(spec.depth - 1):
        b = n["block"].format(i)
        y = norm(b + n["norm1"], x)
        q, k, v = (split(linear(b + n[c], y)) for c in "qkv")
        y = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(dim // heads), -1) @ v
        y = linear(b + n["o"], y.transpose(1, 2).reshape(batch, -1, dim))
        x = x + y * w.get(b + "layer_scale1.lambda1", 1)
        y = linear(b + "mlp.fc2", gelu(linear(b + "mlp.fc1", norm(b + n["norm2"], x))))
        x = x + y * w.get(b + "layer_scale2.lambda1", 1)
    return x[:, x.shape[1] - grid * grid :]


@pytest.mark.parametrize("arch", TINY)
def test_equals_a_short_vit(arch):
    spec = TINY[arch]
    backbone = randomise(VisionBackbone(tiny(spec)))
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size)
    with torch.no_grad():
        (got,) = backbone(pixels)
        want = short_vit(spec, {k: v.double() for k, v in backbone.towers[spec.name].state_dict().items()}, pixels.double())
    assert got.shape == (2, spec.num_patches, spec.width)
    error = (got.double() - want).norm() / want.norm()
    assert error <= 1e-5, f"{arch}: relative error {error:.2e}"


@pytest.mark.parametrize("arch", TINY)
def test_equals_the_hidden_states_of_the_whole_model(arch):
    """transformers' own model of full depth: hidden_states[depth - 1] is the output of block depth - 2 (0-based)."""
    from transformers import CLIPVisionModel, Dinov2WithRegistersModel, SiglipVisionModel, ViTModel

    spec = TINY[arch]
    backbone = randomise(VisionBackbone(tiny(spec)))
    cls = {"dinov2": Dinov2WithRegistersModel, "siglip": SiglipVisionModel, "clip": CLIPVisionModel, "in1k": ViTModel}[arch]
    config = backbone.towers[spec.name].config
    whole = randomise(cls(type(config)(**{**config.to_dict(), "num_hidden_layers": spec.depth})), seed=1)
    missing, unexpected = whole.load_state_dict(backbone.towers[spec.name].state_dict(), strict=False)
    assert not unexpected and missing  # the last block, the final norm, ...
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size)
    with torch.no_grad():
        want = whole(pixels, output_hidden_states=True).hidden_states[spec.depth - 1][:, spec.prefix_tokens :]
        (got,) = backbone(pixels)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(
    "backbone_id, patches, dims",
    [
        ("clip-vit-b", 196, (768,)),
        ("clip-vit-l", 256, (1024,)),
        ("clip-vit-l-336px", 576, (1024,)),
        ("siglip-vit-b16-224px", 196, (768,)),
        ("siglip-vit-b16-256px", 256, (768,)),
        ("siglip-vit-b16-384px", 576, (768,)),
        ("siglip-vit-so400m", 256, (1152,)),
        ("siglip-vit-so400m-384px", 729, (1152,)),
        ("dinov2-vit-l", 256, (1024,)),
        ("in1k-vit-l", 196, (1024,)),
        ("dinoclip-vit-l-336px", 576, (1024, 1024)),
        ("dinosiglip-vit-so-384px", 729, (1024, 1152)),
    ],
)
def test_every_variant_builds_on_meta(backbone_id, patches, dims):
    backbone = VisionBackbone(VISION_BACKBONES[backbone_id], device="meta")
    config = backbone.config
    assert (config.num_patches, tuple(t.width for t in config.towers), config.width) == (patches, dims, sum(dims))
    assert all(p.is_meta for p in backbone.parameters())
    assert not any(b.is_meta for b in backbone.buffers())


def test_every_variant_is_covered():
    (mark,) = test_every_variant_builds_on_meta.pytestmark
    assert {row[0] for row in mark.args[1]} == set(VISION_BACKBONES)


def test_cobra_3b_towers_stop_at_the_second_to_last_block():
    """Block 22 of DINO's 24 and 25 of SigLIP's 27 is the last that exists, and nothing comes after it."""
    towers = VisionBackbone(VISION_BACKBONES["dinosiglip-vit-so-384px"], device="meta").towers
    dino, siglip = set(towers["dino"].state_dict()), set(towers["siglip"].state_dict())
    assert {k.split(".")[2] for k in dino if k.startswith("encoder.layer.")} == {str(i) for i in range(23)}
    assert {k.split(".")[2] for k in siglip if k.startswith("encoder.layers.")} == {str(i) for i in range(26)}
    assert not [k for k in dino | siglip if k.startswith(("layernorm", "post_layernorm", "head"))]
    assert "embeddings.mask_token" not in dino
    assert towers["dino"].embeddings.position_embeddings.shape == (1, 730, 1024)
    assert towers["siglip"].embeddings.position_embedding.weight.shape == (729, 1152)
    assert towers["siglip"].config.hidden_act == "gelu" and towers["siglip"].config.layer_norm_eps == 1e-6
    assert towers["dino"].config.layer_norm_eps == 1e-6
    assert {t.config._attn_implementation for t in towers.values()} == {"sdpa"}


def test_the_last_pixels_are_ignored():
    spec = TINY["siglip"]
    backbone = randomise(VisionBackbone(tiny(spec)))
    pixels = torch.randn(1, 3, 45, 45)
    changed = pixels.clone()
    changed[:, :, 40:] = 7.0
    changed[:, :, :, 40:] = 7.0
    with torch.no_grad():
        assert torch.equal(backbone(pixels)[0], backbone(changed)[0])


def test_patches_are_row_major():
    """One block only: change a pixel of row 1, column 2; without attention only that patch may differ."""
    spec = dataclasses.replace(TINY["siglip"], depth=2)
    backbone = randomise(VisionBackbone(tiny(spec)))
    with torch.no_grad():
        for p in backbone.towers[spec.name].encoder.layers[0].self_attn.parameters():
            p.zero_()
        pixels = torch.randn(1, 3, 45, 45)
        changed = pixels.clone()
        changed[:, :, 8:16, 16:24] += 1.0
        differs = (backbone(pixels)[0] != backbone(changed)[0]).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [1 * spec.grid + 2]


def test_two_towers_keep_order_and_batch():
    backbone = randomise(VisionBackbone(tiny(TINY["dinov2"], TINY["siglip"])))
    pixels = {name: torch.randn(3, 3, 45, 45) for name in ("dino", "siglip")}
    with torch.no_grad():
        dino, siglip = backbone(dict(reversed(pixels.items())))  # the order of the dict does not matter
        alone = backbone({name: p[1:2] for name, p in pixels.items()})
        direct = build_tower(TINY["dinov2"]).eval()
        direct.load_state_dict(backbone.towers["dino"].state_dict())
        torch.testing.assert_close(dino, direct(pixels["dino"]).last_hidden_state[:, 5:])
    torch.testing.assert_close(dino[1:2], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(siglip[1:2], alone[1], rtol=1e-5, atol=1e-5)


def test_dtype_follows_the_weights():
    backbone = randomise(VisionBackbone(tiny(TINY["in1k"]), dtype=torch.bfloat16))
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 40, 40))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resample_is_bicubic_with_antialias(dtype):
    embedding = torch.randn(1, 37 * 37, 24).to(dtype)
    got = resample_position_embedding(embedding, 27)
    image = embedding.float().permute(0, 2, 1).reshape(1, 24, 37, 37)
    want = F.interpolate(image, (27, 27), mode="bicubic", antialias=True).flatten(2).permute(0, 2, 1)
    assert got.shape == (1, 729, 24) and got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0)
    plain = F.interpolate(image, (27, 27), mode="bicubic").flatten(2).permute(0, 2, 1)
    assert not torch.allclose(got.float(), plain, atol=1e-2)  # the antialias matters


def test_resample_keeps_constants_and_the_same_grid():
    embedding = torch.randn(1, 16, 8)
    assert resample_position_embedding(embedding, 4) is embedding
    flat = torch.full((1, 37 * 37, 2), 0.25)
    torch.testing.assert_close(resample_position_embedding(flat, 27), torch.full((1, 729, 2), 0.25))


@pytest.mark.parametrize("shape", [(1, 15, 8), (2, 16, 8), (16, 8), (1, 0, 8)])
def test_resample_refuses(shape):
    with pytest.raises(ShapeError, match="expected \\(1, n \\* n, dim\\)"):
        resample_position_embedding(torch.zeros(shape), 3)


def test_errors_name_what_was_expected():
    backbone = VisionBackbone(tiny(TINY["dinov2"], TINY["siglip"]))
    pixels = torch.zeros(1, 3, 45, 45)
    with pytest.raises(ArgumentError, match="expected a dict with dino, siglip"):
        backbone(pixels)
    with pytest.raises(ArgumentError, match="expected dino, siglip; the names come"):
        backbone({"dino": pixels})
    with pytest.raises(ShapeError, match=r"'siglip'\] has shape \(1, 3, 45, 44\), expected \(batch=1, 3, 45, 45\)"):
        backbone({"dino": pixels, "siglip": pixels[..., :44]})
    with pytest.raises(ShapeError, match=r"'siglip'\] has shape \(2, .*batch=1"):
        backbone({"dino": pixels, "siglip": pixels.repeat(2, 1, 1, 1)})
    with pytest.raises(ShapeError, match="mlp_width has 33, expected a multiple of width=32"):
        build_tower(dataclasses.replace(TINY["dinov2"], mlp_width=33))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    VisionBackbone(PRESETS[name].vision, device="meta")
