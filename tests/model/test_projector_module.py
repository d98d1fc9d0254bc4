"""The projector module: upstream's parameter names, and the arithmetic of plain torch layers on concatenated features."""

import pytest
import torch
import torch.nn.functional as F

from cobra.config import PRESETS, ProjectorConfig
from cobra.projector import Projector
from cobra_kernels.errors import ShapeError

WIDTHS, OUT, GRID = (24, 40), 32, 5
KINDS = ("linear", "gelu-mlp", "fused-gelu-mlp", "ldpnet", "fused-ldpnet")
SHAPES = {  # names and shapes as in Cobra's checkpoints
    "linear": {"projector.weight": (32, 64), "projector.bias": (32,)},
    "gelu-mlp": {
        "projector.0.weight": (32, 64),
        "projector.0.bias": (32,),
        "projector.2.weight": (32, 32),
        "projector.2.bias": (32,),
    },
    "fused-gelu-mlp": {
        "projector.0.weight": (256, 64),
        "projector.0.bias": (256,),
        "projector.2.weight": (32, 256),
        "projector.2.bias": (32,),
        "projector.4.weight": (32, 32),
        "projector.4.bias": (32,),
    },
    "fused-ldpnet": {
        "projector.0.weight": (256, 64),
        "projector.0.bias": (256,),
        "projector.2.weight": (32, 256),
        "projector.2.bias": (32,),
        "projector.4.peg.0.weight": (32, 1, 3, 3),
        "projector.4.peg.0.bias": (32,),
    },
}
SHAPES["ldpnet"] = {**SHAPES["gelu-mlp"], **{k: v for k, v in SHAPES["fused-ldpnet"].items() if "peg" in k}}


def features(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, GRID * GRID, width, generator=g).to(dtype) for width in WIDTHS)


def plain(kind, w, x):
    """The same in torch.nn.functional, on the concatenation."""
    names = ["projector"] if kind == "linear" else [f"projector.{i}" for i in (0, 2, 4) if f"projector.{i}.weight" in w]
    for i, name in enumerate(names):
        x = F.linear(x if i == 0 else F.gelu(x), w[name + ".weight"], w[name + ".bias"])
    if kind.endswith("ldpnet"):
        x = x.transpose(1, 2).reshape(x.shape[0], OUT, GRID, GRID)
        x = F.adaptive_avg_pool2d(x, (14, 14))
        x = x + F.conv2d(x, w["projector.4.peg.0.weight"], w["projector.4.peg.0.bias"], padding=1, groups=OUT)
        x = x.flatten(2).transpose(1, 2)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_upstreams(kind):
    config = ProjectorConfig(kind, sum(WIDTHS), OUT, GRID)
    projector = Projector(config)
    assert {k: tuple(v.shape) for k, v in projector.state_dict().items()} == SHAPES[kind]
    assert sum(p.numel() for p in projector.parameters()) == config.num_parameters


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_torch_on_concatenated_features(kind):
    projector = Projector(ProjectorConfig(kind, sum(WIDTHS), OUT, GRID))
    x = features()
    with torch.no_grad():
        got = projector(x)
        want = plain(kind, {k: v.double() for k, v in projector.state_dict().items()}, torch.cat(x, -1).double())
    assert got.shape == (2, projector.config.num_tokens, OUT) and got.is_contiguous()
    error = (got.double() - want).norm() / want.norm()
    assert error <= 1e-5, f"{kind}: relative error {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_plain_torch(kind):
    projector = Projector(ProjectorConfig(kind, sum(WIDTHS), OUT, GRID))
    x = [f.requires_grad_() for f in features()]
    got = projector(x)
    grad = torch.randn_like(got)
    inputs = [*x, *projector.parameters()]
    ours = torch.autograd.grad(got, inputs, grad)
    theirs = torch.autograd.grad(plain(kind, dict(projector.named_parameters()), torch.cat(x, -1)), inputs, grad)
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_one_tower_and_views():
    """A single tensor is taken as it is; features that are slices of a longer sequence, as towers give them, too."""
    projector = Projector(ProjectorConfig("gelu-mlp", 24, OUT, GRID))
    whole = torch.randn(2, 5 + GRID * GRID, 24)
    with torch.no_grad():
        assert torch.equal(projector(whole[:, 5:]), projector([whole[:, 5:].contiguous()]))


def test_bf16():
    projector = Projector(ProjectorConfig("fused-gelu-mlp", sum(WIDTHS), OUT, GRID), dtype=torch.bfloat16)
    x = features(torch.bfloat16)
    with torch.no_grad():
        got = projector(x)
        want = plain("fused-gelu-mlp", {k: v.double() for k, v in projector.state_dict().items()}, torch.cat(x, -1).double())
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() <= 1e-2 * want.norm()


def test_cobra_3b_has_47789568_parameters():
    with torch.device("meta"):
        projector = Projector(PRESETS["cobra-3b"].projector)
    assert sum(p.numel() for p in projector.parameters()) == 47_789_568


def test_wrong_width():
    projector = Projector(ProjectorConfig("linear", 64, OUT, GRID))
    with pytest.raises(ShapeError, match=r"sum v_k = 64; the sum comes from the vision towers"):
        projector((torch.zeros(1, 25, 24), torch.zeros(1, 25, 24)))
