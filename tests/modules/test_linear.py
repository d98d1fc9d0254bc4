"""The choice between our kernel and two libraries: the same numbers, and F.linear wherever the others do not serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cobra_kernels import extension
from cobra_kernels import linear as module
from cobra_kernels.linear import apply_linear, linear
from tests.tolerances import GEMM, OUTPUT, assert_close


@pytest.fixture
def calls(monkeypatch):
    """Shapes that went to oneDNN, with all products sent there."""
    seen, original = [], module._onednn
    if original is None:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(module, "_onednn", lambda x, *rest: seen.append(tuple(x.shape)) or original(x, *rest))
    monkeypatch.setattr(module, "MIN_PRODUCTS", 1)
    monkeypatch.setattr(module, "MOST_ROWS", 0)
    return seen


@pytest.fixture
def few(monkeypatch):
    """Shapes that went to our kernel, whatever the size of the weight."""
    seen, original = [], module._few_rows_linear
    if extension.absence() is not None:
        pytest.skip(extension.absence())
    monkeypatch.setattr(module, "_few_rows_linear", lambda x, *rest: seen.append(tuple(x.shape)) or original(x, *rest))
    monkeypatch.setattr(module, "MIN_WEIGHT", 1)
    return seen


def layouts(x):
    wide = torch.randn(*x.shape[:-1], x.shape[-1] + 9, dtype=x.dtype)
    wide[..., 4:-5] = x
    return {
        "contiguous": x,
        "columns of a wider row": wide[..., 4:-5],
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "every other row": torch.stack([x, x], dim=-2).flatten(-3, -2)[..., ::2, :] if x.dim() == 2 else x,
        "broadcast": x[..., :1].expand_as(x),
    }


@pytest.mark.parametrize("shape", [(1, 7), (5, 33), (2, 19, 48), (2, 3, 4, 16)], ids=str)
@pytest.mark.parametrize("out", [1, 8, 65])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_equals_torch_for_any_layout(calls, shape, out, bias):
    weight, b = torch.randn(out, shape[-1]), torch.randn(out) if bias else None
    for name, x in layouts(torch.randn(shape)).items():
        got = linear(x, weight, b)
        assert_close(got, F.linear(x.double(), weight.double(), None if b is None else b.double()).float(), GEMM, name)
        assert got.is_contiguous()
    assert len(calls) == 5


def test_stays_with_torch_where_it_must(calls):
    x, layer = torch.randn(4, 32), nn.Linear(32, 16)
    apply_linear(layer, x)
    assert len(calls) == 1
    torch.func.grad(lambda x: linear(x, layer.weight).sum())(x)
    torch.func.vmap(lambda x: linear(x, layer.weight))(x)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(linear(torch.autograd.forward_ad.make_dual(x, x), layer.weight)).tangent
    assert_close(tangent, F.linear(x, layer.weight), GEMM)
    assert len(calls) == 1  # transforms see through torch's own product only
    with torch.no_grad():
        linear(x.double(), layer.weight.double())
        linear(x.bfloat16(), layer.weight.bfloat16())
        linear(x.to("meta"), layer.weight.to("meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, layer.weight).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            linear(x, layer.weight)
        linear(x[:0], layer.weight)
        assert len(calls) == 1
        hooked = nn.Linear(32, 16)
        hooked.register_forward_hook(lambda m, args, out: out * 0)
        assert not apply_linear(hooked, x).any()

        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        assert torch.equal(apply_linear(d := Doubled(32, 16), x), d(x))
        assert len(calls) == 1


@torch.no_grad()
def test_a_weight_with_gaps_is_made_dense(monkeypatch):
    """oneDNN has fast products for dense weights, transposed or not, and plain loops for all others."""
    seen = []
    monkeypatch.setattr(module, "_onednn", lambda x, w, *rest: seen.append((w.data_ptr(), w.stride())) or F.linear(x, w))
    monkeypatch.setattr(module, "MIN_PRODUCTS", 1)
    x, wide = torch.randn(5, 24), torch.randn(24, 80)
    for weight, copied in ((wide.t(), False), (wide.t().contiguous(), False), (wide[:, :48].t(), True), (torch.randn(9, 30)[:, :24], True)):
        assert_close(linear(x, weight), x @ weight.t(), GEMM)
        pointer, strides = seen.pop()
        assert (pointer != weight.data_ptr()) == copied and min(strides) == 1 and max(strides) in weight.shape
    assert not seen


@pytest.mark.parametrize("shape", [(1, 7), (65, 33), (2, 19, 48)], ids=str)
@pytest.mark.parametrize("wanted", ["xwb", "x", "w", "b", "xw"])
def test_gradients_equal_torchs_for_any_layout(calls, shape, wanted):
    """Of the product, and of its gradients; expanded gradients that arrive included; no product for what nobody wants."""
    weight, bias = torch.randn(24, shape[-1]), torch.randn(24)
    for name, x in layouts(torch.randn(shape)).items():
        for dy in (torch.randn(*shape[:-1], 24), torch.ones(()).expand(*shape[:-1], 24)):
            results = []
            for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
                tensors = [t.detach().to(dtype).requires_grad_(key in wanted) for key, t in zip("xwb", (x, weight, bias))]
                leaves = [t for t in tensors if t.requires_grad]
                calls.clear()
                out = function(*tensors)
                grads = torch.autograd.grad(out, leaves, dy.to(dtype), create_graph=len(wanted) > 1)
                count = len(calls)
                if len(wanted) > 1:
                    grads += torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)
                results.append([out, *(g for g in grads if g is not None)])
                if function is linear:
                    assert count == 1 + len(set(wanted) & set("xw"))
            for got, want in zip(*results, strict=True):
                assert_close(got, want, GEMM, name)


def test_a_backward_inside_autocast_stays_in_fp32(calls):
    x, weight = torch.randn(9, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    out = linear(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.sum().backward()
    assert len(calls) == 3
    assert_close(x.grad, torch.ones(9, 16) @ weight.detach(), GEMM)


@torch.no_grad()
def test_small_products_stay_with_torch(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_onednn", lambda x, w, *rest: seen.append(x.shape[0]) or F.linear(x, w))
    weight = torch.randn(80, 1536)
    for rows in (1, 4, 5, 512):
        linear(torch.randn(rows, 1536), weight)
    assert seen == [5, 512]


@torch.no_grad()
def test_route_linears_keeps_names_and_results(calls):
    class Own(nn.Linear):
        pass

    part = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Sequential(nn.Linear(16, 32, bias=False), Own(32, 8)))
    x, names = torch.randn(4, 32), list(part.state_dict())
    expected = part(x)
    assert not calls
    assert module.route_linears(part) is part
    assert torch.allclose(part(x), expected, atol=1e-6)
    assert len(calls) == 2  # the subclass was left alone
    assert list(part.state_dict()) == names and isinstance(part[0], nn.Linear)
    part[0].register_forward_hook(lambda m, args, out: out * 0)
    assert torch.equal(part(x), part(x * 2))  # hooks still run


@pytest.mark.parametrize("shape", [(7,), (1, 70), (4, 33), (2, 2, 48), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_few_rows_equal_torch_for_any_layout(few, shape, bias, dtype):
    """Sums in fp32, rounded once; a row's bits do not depend on the others."""
    weight, b = torch.randn(19, shape[-1] + 3).to(dtype)[:, : shape[-1]], torch.randn(38).to(dtype)[::2] if bias else None
    for name, x in layouts(torch.randn(shape).to(dtype)).items():
        got = linear(x, weight, b)
        assert got.dtype == dtype and got.shape == (*x.shape[:-1], 19) and got.is_contiguous()
        assert_close(got, F.linear(x.double(), weight.double(), None if b is None else b.double()), OUTPUT[dtype], name)
        for row, alone in zip(got.reshape(-1, 19), x.reshape(-1, shape[-1])):
            assert torch.equal(linear(alone, weight, b), row)
    assert len(few) == sum(1 + x.shape[:-1].numel() for x in layouts(torch.randn(shape)).values())


def test_few_rows_go_elsewhere_where_they_must(few, monkeypatch):
    x, weight = torch.randn(2, 64), torch.randn(80, 64)
    linear(x, weight.clone().requires_grad_())
    linear(x.clone().requires_grad_(), weight)
    with torch.no_grad():
        linear(torch.randn(module.MOST_ROWS + 1, 64), weight)
        linear(x, weight.t().contiguous().t())  # its columns are not neighbours
        linear(x.double(), weight.double())
        linear(x[:0], weight)
        linear(x.to("meta"), weight.to("meta"))
        torch.func.vmap(lambda x: linear(x, weight))(x)
        torch.compile(lambda x: linear(x, weight), backend="eager", fullgraph=True)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            linear(x, weight)
        assert counter.get_total_flops() == 2 * 2 * 64 * 80
        for wrong in ((x[:, :5], weight, None), (x, weight, torch.randn(81)), (x, weight.bfloat16(), None)):
            with pytest.raises(RuntimeError) as ours:
                linear(*wrong)
            with pytest.raises(RuntimeError) as torchs:
                F.linear(*wrong)
            assert str(ours.value) == str(torchs.value)
        monkeypatch.setattr(extension, "absence", lambda: "not built")
        assert_close(linear(x, weight), F.linear(x, weight), GEMM)
    assert few == []


@torch.no_grad()
def test_few_rows_op_checks_what_it_indexes(few):
    x, weight = torch.randn(2, 64), torch.randn(80, 64)
    op = torch.ops.cobra_kernels.few_rows_linear
    for bias in (None, torch.randn(80)):
        torch.library.opcheck(op, (x, weight, bias), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    for wrong, message in (
        ((x[0], weight, None), "x has 1 dims"),
        ((x, weight[:, 1:], None), "weight has size 63 at dim 1, expected 64"),
        ((x, weight.t().contiguous().t(), None), "not neighbours"),
        ((x, weight, torch.randn(79)), "bias has size 79"),
        ((x.double(), weight, None), "x is float64"),
        ((x, weight.long(), None), "weight is not float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*wrong)


@torch.no_grad()
def test_small_weights_stay_with_torch(monkeypatch):
    monkeypatch.setattr(module, "_few_rows_linear", lambda *_: pytest.fail("a weight of 64 x 64"))
    linear(torch.randn(1, 64), torch.randn(64, 64))
