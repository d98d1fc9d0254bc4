"""Vision towers: pixels in, one patch feature tensor per tower out.

    pixel_values {"dino": (batch, 3, px, px), "siglip": ...} -> ((batch, num_patches, 1024), (batch, num_patches, 1152))

The architectures come from `transformers`; this file fixes what a tower of Cobra is:
- the features are the output of the second-to-last block. The last block is never built, nor are the final norm and the heads;
- prefix tokens (class token, registers) are dropped;
- positions are learned for exactly this grid, nothing is interpolated at run time (`resample_position_embedding` does it once,
  for a converter);
- GELU is the exact erf form, except in CLIP, which was trained with x * sigmoid(1.702 x);
- LayerNorm epsilon is 1e-6, and 1e-5 in CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra.config import TowerConfig, VisionConfig
from cobra_kernels.errors import ArgumentError, ShapeError
from cobra_kernels.linear import route_linears


def _config_and_class(spec: TowerConfig):
    """The transformers configuration of a tower, and its model class. Imported here: it takes seconds."""
    common = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.blocks_run,
        "num_attention_heads": spec.heads,
        "patch_size": spec.patch_size,
        "image_size": spec.image_size,
        "attn_implementation": "sdpa",
    }
    if spec.kind == "dinov2":
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        ratio, rest = divmod(spec.mlp_width, spec.width)
        if rest:
            raise ShapeError(
                f"build_tower: mlp_width has {spec.mlp_width}, expected a multiple of width={spec.width}; transformers' DINOv2 has no other"
            )
        common |= {"mlp_ratio": ratio, "num_register_tokens": spec.registers}
        return Dinov2WithRegistersConfig(**common, hidden_act="gelu", layer_norm_eps=1e-6), Dinov2WithRegistersModel
    common["intermediate_size"] = spec.mlp_width
    if spec.kind == "siglip":
        from transformers import SiglipVisionConfig, SiglipVisionModel

        # transformers' default is tanh-GELU; Cobra ran these weights with the erf form
        config = SiglipVisionConfig(**common, hidden_act="gelu", layer_norm_eps=1e-6, vision_use_head=False)
        return config, SiglipVisionModel
    if spec.kind == "clip":
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionConfig(**common, hidden_act="quick_gelu", layer_norm_eps=1e-5), CLIPVisionModel
    from transformers import ViTConfig, ViTModel

    return ViTConfig(**common, hidden_act="gelu", layer_norm_eps=1e-6), ViTModel


def build_tower(spec: TowerConfig) -> nn.Module:
    """The transformers model of one tower, cut after block depth - 2, with nothing that its features do not need."""
    config, cls = _config_and_class(spec)
    model = cls(config, add_pooling_layer=False) if spec.kind == "in1k" else cls(config)
    final_norm = "post_layernorm" if spec.kind in ("siglip", "clip") else "layernorm"
    setattr(model, final_norm, nn.Identity())
    if spec.kind == "dinov2":
        model.embeddings.mask_token = None  # of the pretraining task
    if spec.kind in ("siglip", "clip"):
        # a constant that no checkpoint carries: keep it real when the model is built on the meta device
        embeddings = model.embeddings
        if embeddings.position_ids.is_meta:
            embeddings.position_ids = torch.arange(embeddings.num_positions, device="cpu")[None]
    return route_linears(model)


class VisionBackbone(nn.Module):
    """One tower or two side by side. Parameters are named `towers.<name>.<the transformers name>`."""

    def __init__(self, config: VisionConfig, *, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        with torch.device(device if device is not None else torch.get_default_device()):
            self.towers = nn.ModuleDict({spec.name: build_tower(spec) for spec in config.towers})
        if dtype is not None:
            self.to(dtype)

    def forward(self, pixel_values: Mapping[str, Tensor] | Tensor) -> tuple[Tensor, ...]:
        """pixel_values: tower name -> (batch, 3, px, px), each normalised for its tower; with one tower the tensor will do.

        Returns one (batch, num_patches, width) per tower, patches row-major over the grid, in the dtype of the weights (of
        autocast, when that is on).
        """
        names = [spec.name for spec in self.config.towers]
        if isinstance(pixel_values, Tensor):
            if len(names) > 1:
                raise ArgumentError(f"VisionBackbone: pixel_values is one tensor, expected a dict with {', '.join(names)}")
            pixel_values = {names[0]: pixel_values}
        if set(pixel_values) != set(names):
            raise ArgumentError(
                f"VisionBackbone: pixel_values has {', '.join(map(str, pixel_values)) or 'nothing'}, expected "
                f"{', '.join(names)}; the names come from the config"
            )
        batch = next((len(pixel_values[name]) for name in names if pixel_values[name].dim()), 0)
        features = []
        for spec in self.config.towers:
            pixels, tower = pixel_values[spec.name], self.towers[spec.name]
            if pixels.shape != (batch, 3, spec.image_size, spec.image_size):
                raise ShapeError(
                    f"VisionBackbone: pixel_values[{spec.name!r}] has shape {tuple(pixels.shape)}, expected (batch={batch}, 3, "
                    f"{spec.image_size}, {spec.image_size}); batch comes from the first tower, the size from the config"
                )
            hidden = tower(pixels.to(tower.dtype)).last_hidden_state  # (batch, prefix_tokens + num_patches, width)
            features.append(hidden[:, spec.prefix_tokens :])
        return tuple(features)


def resample_position_embedding(embedding: Tensor, grid: int) -> Tensor:
    """Resample a square grid of learned positions, as DINOv2's 37x37 (518 px) to the 27x27 of 384 px.

    embedding: (1, old * old, dim), patches only, row-major. Returns (1, grid * grid, dim) in the same dtype. Bicubic with
    antialiasing, computed in fp32; the same grid comes back as it is.
    """
    old = math.isqrt(embedding.shape[1]) if embedding.dim() == 3 else 0
    if embedding.dim() != 3 or embedding.shape[0] != 1 or old * old != embedding.shape[1] or old == 0:
        raise ShapeError(
            f"resample_position_embedding: embedding has shape {tuple(embedding.shape)}, expected (1, n * n, dim), patches only"
        )
    if type(grid) is not int or grid < 1:
        raise ArgumentError(f"resample_position_embedding: grid has {grid!r}, expected an int >= 1")
    if grid == old:
        return embedding
    image = embedding.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, dim, old, old)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return image.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(embedding.dtype)
