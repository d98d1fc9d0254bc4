"""The projector: patch features of every tower to embeddings of the language model.

    ((batch, patches, v_0), (batch, patches, v_1)) -> (batch, tokens, d_model)

tokens = patches, or 14 * 14 for the LDP kinds, which pool. The towers' features go to the kernel as they are: it reads them
as if concatenated, and no concatenation is made. Parameter names are those of Cobra's checkpoints:

    linear                      projector.{weight, bias}
    gelu-mlp, fused-gelu-mlp    projector.{0, 2 [, 4]}.{weight, bias}
    ldpnet, fused-ldpnet        projector.{0, 2}.{weight, bias}, projector.4.peg.0.{weight, bias}
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cobra.config import LDP_GRID, ProjectorConfig
from cobra_kernels import ldp_projector, mlp_projector
from cobra_kernels.errors import ShapeError


class Downsample(nn.Module):
    """Holds the depthwise 3x3 convolution of LDPv2; the pooling before it has no parameters."""

    def __init__(self, width: int, *, device=None, dtype=None):
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width, device=device, dtype=dtype))


class Projector(nn.Module):
    """Linear layers with exact GELU between; LDP kinds then pool the patch grid and add a depthwise 3x3 of the result."""

    def __init__(self, config: ProjectorConfig, *, device=None, dtype=None):
        super().__init__()
        self.config = config
        linears = [nn.Linear(i, o, device=device, dtype=dtype) for i, o in config.linears]
        if len(linears) == 1:
            self.projector = linears[0]
        else:
            # GELUs and LDP's pooling hold the places that the checkpoint's names count
            parts = [part for linear in linears for part in (linear, nn.GELU())]
            parts = parts + [Downsample(config.out_width, device=device, dtype=dtype)] if config.is_ldp else parts[:-1]
            self.projector = nn.Sequential(*parts)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """features: one (batch, patches, v_k) per tower, sum v_k = in_width -> (batch, tokens, out_width), same dtype."""
        features = (features,) if isinstance(features, Tensor) else tuple(features)
        widths = [f.shape[-1] for f in features]
        if sum(widths) != self.config.in_width or any(f.dim() != 3 for f in features):
            raise ShapeError(
                f"Projector: features have shapes {[tuple(f.shape) for f in features]}, expected (batch, patches, v_k) with "
                f"sum v_k = {self.config.in_width}; the sum comes from the vision towers"
            )
        if isinstance(self.projector, nn.Linear):
            return mlp_projector(features, [self.projector.weight], [self.projector.bias])
        linears = [part for part in self.projector if isinstance(part, nn.Linear)]
        weights, biases = [part.weight for part in linears], [part.bias for part in linears]
        if not self.config.is_ldp:
            return mlp_projector(features, weights, biases)
        peg = self.projector[-1].peg[0]
        grid = (self.config.grid, self.config.grid)
        return ldp_projector(features, weights, biases, peg.weight, peg.bias, grid=grid, out_grid=LDP_GRID)
