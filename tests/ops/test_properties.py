"""What must hold whatever the numbers are: relations between calls, on every room and backend, with no stored reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import cobra_kernels
from cobra_kernels import (
    causal_conv1d,
    causal_conv1d_update,
    errors,
    ldp_projector,
    mlp_projector,
    rms_norm,
    selective_scan,
    selective_state_update,
    selfcheck,
)
from cobra_kernels.selfcheck import Case, run
from tests.conftest import kernel_backends
from tests.tolerances import CHUNKED, GRADIENT, assert_close

BACKENDS = ["reference", *kernel_backends()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
layouts = pytest.mark.parametrize("channel_last", [False, True], ids=["channel_first", "channel_last"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scan_inputs(batch=2, dim=18, seqlen=37, dstate=7, channel_last=False, **options):
    return selfcheck.selective_scan_inputs(generator(), batch, dim, seqlen, dstate, channel_last=channel_last, **options)


def scan(inputs, backend, **extra):
    """(out, last_state)."""
    return selective_scan(**{**inputs, **extra}, return_last_state=True, backend=backend)


def conv(inputs, backend, **extra):
    """(out, final_states)."""
    return causal_conv1d(**{**inputs, **extra}, activation="silu", return_final_states=True, backend=backend)


def steps(inputs: dict, part: slice) -> dict:
    """The same scan or conv on a range of steps."""
    variable = ("u", "delta", "z", "x", "B", "C")
    return {k: v[..., part] if k in variable and v is not None else v for k, v in inputs.items()}


def rows(inputs: dict, index, names: tuple[str, ...]) -> dict:
    """The same call on some batch rows."""
    return {k: v[index] if k in names and v is not None else v for k, v in inputs.items()}


SCAN_BATCHED = ("u", "delta", "z", "B", "C", "initial_state")


# --- 1, 2: chunks and steps equal one long call ----------------------------------------------------------------------


@every_backend
@layouts
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 16, 31, 36, 37])
def test_01_scan_and_conv_split_anywhere(backend, channel_last, cut):
    inputs = scan_inputs(channel_last=channel_last, initial=True)
    whole, state = scan(inputs, backend)
    first, middle = scan(steps(inputs, slice(0, cut)), backend)
    second, end = scan(steps(inputs, slice(cut, None)), backend, initial_state=middle)
    assert_close(torch.cat([first, second], -1), whole, CHUNKED)
    assert_close(end, state, CHUNKED, "last_state")

    inputs = selfcheck.causal_conv1d_inputs(generator(), 2, 18, 37, 4, initial=True)
    if channel_last:
        inputs["x"] = inputs["x"].mT.contiguous().mT
    whole, state = conv(inputs, backend)
    first, middle = conv(steps(inputs, slice(0, cut)), backend)
    second, end = conv(steps(inputs, slice(cut, None)), backend, initial_states=middle)
    assert_close(torch.cat([first, second], -1), whole, CHUNKED)
    assert torch.equal(end, state), "final states are inputs, bit for bit"


@every_backend
@pytest.mark.parametrize("seqlen", [1, 2, 3, 4, 33])
def test_02_steps_equal_the_scan(backend, seqlen):
    inputs = scan_inputs(seqlen=seqlen, dstate=16, initial=True)
    whole, last = scan(inputs, backend)
    state = inputs["initial_state"].clone()
    outs = [
        selective_state_update(
            state, inputs["u"][..., t], inputs["delta"][..., t], inputs["A"], inputs["B"][:, 0, :, t], inputs["C"][:, 0, :, t],
            inputs["D"], inputs["z"][..., t], inputs["delta_bias"], True, backend=backend,
        )
        for t in range(seqlen)
    ]  # fmt: skip
    assert_close(torch.stack(outs, -1), whole, CHUNKED)
    assert_close(state, last, CHUNKED, "state")

    inputs = selfcheck.causal_conv1d_inputs(generator(), 2, 18, seqlen, 4, initial=True)
    whole, last = conv(inputs, backend)
    state = inputs["initial_states"].clone()
    outs = [
        causal_conv1d_update(inputs["x"][..., t], state, inputs["weight"], inputs["bias"], "silu", backend=backend) for t in range(seqlen)
    ]
    assert_close(torch.stack(outs, -1), whole, CHUNKED)
    assert torch.equal(state, last)


# --- 3, 4: permutations ----------------------------------------------------------------------------------------------

CALLS = {
    "rms_norm": (Case("rms_norm", {**selfcheck.rms_norm_inputs(generator(), 5, 65), "prenorm": True}), ("x", "residual")),
    "causal_conv1d": (
        Case("causal_conv1d", {**selfcheck.causal_conv1d_inputs(generator(), 5, 33, 40, initial=True), "return_final_states": True}),
        ("x", "initial_states"),
    ),
    "causal_conv1d_update": (
        Case("causal_conv1d_update", selfcheck.causal_conv1d_update_inputs(generator(), 5), ("conv_state",)),
        ("x", "conv_state"),
    ),
    "selective_scan": (Case("selective_scan", {**scan_inputs(5, initial=True), "return_last_state": True}), SCAN_BATCHED),
    "selective_state_update": (
        Case("selective_state_update", selfcheck.selective_state_update_inputs(generator(), 5, 33), ("state",)),
        ("state", "x", "dt", "z", "B", "C"),
    ),
}
every_call = pytest.mark.parametrize("name", list(CALLS))


@every_backend
@every_call
def test_03_batch_rows_permute_and_do_not_depend_on_each_other(backend, name):
    case, batched = CALLS[name]
    outs = run(case, backend)
    order = torch.tensor([3, 0, 4, 1, 2])
    for got, want in zip(run(case._replace(kwargs=rows(case.kwargs, order, batched)), backend), outs):
        if backend == "reference":  # torch's own exp rounds differently at the end of a vector
            assert_close(got, want[order], 1e-6)
        else:
            assert torch.equal(got, want[order])
    if backend != "reference":  # a library may pick another algorithm for another batch
        for got, want in zip(run(case._replace(kwargs=rows(case.kwargs, slice(2, 3), batched)), backend), outs):
            assert torch.equal(got, want[2:3])


@every_backend
@every_call
def test_04_channels_permute(backend, name):
    case, _ = CALLS[name]
    # The channel dim of every argument that has one.
    axis = {"x": 1, "u": 1, "delta": 1, "z": 1, "dt": 1, "residual": 1, "conv_state": 1, "state": 1, "initial_state": 1,
            "initial_states": 1, "A": 0, "D": 0, "weight": 0, "bias": 0, "delta_bias": 0, "dt_bias": 0}  # fmt: skip
    dim = case.kwargs.get("x", case.kwargs.get("u")).shape[1]
    order = torch.randperm(dim, generator=generator(1))
    permuted = {k: v.index_select(axis[k], order) if k in axis and v is not None else v for k, v in case.kwargs.items()}
    for got, want in zip(run(case._replace(kwargs=permuted), backend), run(case, backend)):
        assert_close(got, want.index_select(1, order), 1e-6)


# --- 5..8: closed forms of the scan ----------------------------------------------------------------------------------


@every_backend
@layouts
def test_05_scan_is_linear_in_u_and_state(backend, channel_last):
    inputs = scan_inputs(z=False, initial=True, channel_last=channel_last)
    other = {**inputs, "u": torch.randn_like(inputs["u"]), "initial_state": torch.randn_like(inputs["initial_state"])}
    mix = {**inputs, "u": 2 * inputs["u"] - 3 * other["u"], "initial_state": 2 * inputs["initial_state"] - 3 * other["initial_state"]}
    for a, b, got in zip(scan(inputs, backend), scan(other, backend), scan(mix, backend)):
        assert_close(got, 2 * a - 3 * b, 2e-6)


@every_backend
@layouts
def test_06_no_step_keeps_the_state(backend, channel_last):
    inputs = scan_inputs(z=False, initial=True, channel_last=channel_last)
    inputs["delta"] = torch.full_like(inputs["delta"], -200.0)  # softplus underflows to 0
    inputs["delta_bias"] = None
    out, last = scan(inputs, backend)
    assert torch.equal(last, inputs["initial_state"])
    readout = torch.einsum("bdn,bnl->bdl", inputs["initial_state"].double(), inputs["C"][:, 0].double())
    assert_close(out, readout + (inputs["D"][:, None] * inputs["u"]).double(), 1e-6)


@every_backend
@layouts
def test_07_without_decay_the_scan_is_a_running_sum(backend, channel_last):
    inputs = scan_inputs(z=False, D=False, softplus=False, dstate=1, channel_last=channel_last)
    inputs |= {"A": torch.zeros_like(inputs["A"]), "delta": torch.ones_like(inputs["delta"]), "delta_bias": None}
    inputs |= {"B": torch.ones_like(inputs["B"]), "C": torch.ones_like(inputs["C"])}
    out, last = scan(inputs, backend)
    total = inputs["u"].double().cumsum(-1)
    assert_close(out, total, 1e-6)
    assert_close(last[..., 0], total[..., -1], 1e-6)


@every_backend
@layouts
def test_08_huge_steps_forget_everything(backend, channel_last):
    inputs = scan_inputs(z=False, D=False, softplus=False, initial=True, channel_last=channel_last)
    inputs |= {"delta": torch.full_like(inputs["delta"], 1e4), "delta_bias": None}
    out, _ = scan(inputs, backend)
    memoryless = 1e4 * inputs["u"].double() * (inputs["B"] * inputs["C"]).double().sum(2)
    assert out.isfinite().all()
    assert_close(out, memoryless, 1e-6)


# --- 9..11: time -----------------------------------------------------------------------------------------------------


@every_backend
@layouts
@pytest.mark.parametrize("cut", [1, 5, 16, 31, 36])
def test_09_the_future_does_not_reach_the_past(backend, channel_last, cut):
    inputs = scan_inputs(channel_last=channel_last)
    changed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for name in ("u", "delta", "z", "B", "C"):
        changed[name][..., cut:] = float("nan")
    assert torch.equal(scan(changed, backend)[0][..., :cut], scan(inputs, backend)[0][..., :cut])
    inputs = selfcheck.causal_conv1d_inputs(generator(), 2, 18, 37, 4)
    changed = {**inputs, "x": inputs["x"].clone()}
    changed["x"][..., cut:] = float("nan")
    assert torch.equal(conv(changed, backend)[0][..., :cut], conv(inputs, backend)[0][..., :cut])


@every_backend
@layouts
@pytest.mark.parametrize("cu", [[0, 37], [0, 1, 2, 2, 20, 30], [0, 0, 37], [0, 5, 37, 37], [0]], ids=str)
def test_10_packed_equals_separate_bit_for_bit(backend, channel_last, cu):
    def equal(a, b):  # torch's own exp and SiLU round differently at the end of a vector
        return torch.allclose(a, b, 1e-6, 1e-7) if backend == "reference" else torch.equal(a, b)

    inputs = scan_inputs(1, channel_last=channel_last)
    count = len(cu) - 1
    initial = torch.randn(count, 18, 7, generator=generator(2))
    out, last = scan(inputs, backend, cu_seqlens=torch.tensor(cu), initial_state=initial)
    assert last.shape == (count, 18, 7) and (out[..., cu[-1] :] == 0).all()
    for i in range(count):
        part = slice(cu[i], cu[i + 1])
        one, state = scan(steps(inputs, part), backend, initial_state=initial[i : i + 1])
        assert equal(out[..., part], one) and equal(last[i : i + 1], state)

    inputs = selfcheck.causal_conv1d_inputs(generator(), 1, 18, 37, 4)
    if channel_last:
        inputs["x"] = inputs["x"].mT.contiguous().mT
    initial = torch.randn(count, 18, 3, generator=generator(3))
    out, last = conv(inputs, backend, cu_seqlens=torch.tensor(cu), initial_states=initial)
    assert (out[..., cu[-1] :] == 0).all()
    for i in range(count):
        part = slice(cu[i], cu[i + 1])
        one, state = conv(steps(inputs, part), backend, initial_states=initial[i : i + 1])
        assert equal(out[..., part], one) and torch.equal(last[i : i + 1], state)


@every_backend
@layouts
def test_11_masked_left_padding_changes_nothing(backend, channel_last):
    inputs = scan_inputs(channel_last=channel_last)
    padded = dict(inputs)
    for name in ("u", "delta", "z", "B", "C"):
        value = -200.0 if name == "delta" else 0.0  # softplus(-200) = 0: no step
        padded[name] = F.pad(inputs[name], (9, 0), value=value)
    padded["delta_bias"] = inputs["delta_bias"]
    for got, want in zip(scan(padded, backend), scan(inputs, backend)):
        assert_close(got[..., -want.shape[-1] :], want, 1e-6)
    inputs = selfcheck.causal_conv1d_inputs(generator(), 2, 18, 37, 4)
    padded = {**inputs, "x": F.pad(inputs["x"], (9, 0))}
    assert_close(conv(padded, backend)[0][..., 9:], conv(inputs, backend)[0], 1e-6)


# --- 12, 13: gradients -----------------------------------------------------------------------------------------------


def differentiable(name: str):
    """A call in fp64 as f(*tensors) -> outputs, and its tensors."""
    g = generator(5)
    makers = {
        "rms_norm": lambda: {**selfcheck.rms_norm_inputs(g, 3, 9), "prenorm": True},
        "causal_conv1d": lambda: {**selfcheck.causal_conv1d_inputs(g, 2, 3, 6, initial=True), "return_final_states": True, "activation": "silu"},
        "selective_scan": lambda: {**selfcheck.selective_scan_inputs(g, 2, 4, 6, 3, 2, initial=True), "return_last_state": True},
        "mlp_projector": lambda: selfcheck.mlp_projector_inputs(g, (2, 3), (3, 4), (5, 4)),
        "ldp_projector": lambda: selfcheck.ldp_projector_inputs(g, 1, (4, 4), (3, 3), (3, 2), (5, 4)),
    }
    ops = {f.__name__: f for f in (rms_norm, causal_conv1d, selective_scan, mlp_projector, ldp_projector)}
    kwargs = {k: selfcheck.map_tensors(v, selfcheck.in_fp64) for k, v in makers[name]().items()}
    leaves: list[torch.Tensor] = []
    for value in kwargs.values():
        selfcheck.map_tensors(value, lambda t: leaves.append(t.requires_grad_()) or t)

    def f(backend, *tensors):
        replaced = iter(tensors)
        out = ops[name](**{k: selfcheck.map_tensors(v, lambda t: next(replaced)) for k, v in kwargs.items()}, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    return f, leaves


DIFFERENTIABLE = ["rms_norm", "causal_conv1d", "selective_scan", "mlp_projector", "ldp_projector"]


@every_backend
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_12_gradient_along_a_direction_is_the_finite_difference(backend, name):
    f, leaves = differentiable(name)
    outs = f(backend, *leaves)
    weights = [torch.randn_like(o) for o in outs]
    grads = torch.autograd.grad(outs, leaves, weights)
    direction = [torch.randn_like(t) for t in leaves]
    slope = sum((g * d).sum() for g, d in zip(grads, direction))

    def value(h):
        with torch.no_grad():
            return sum((o * w).sum() for o, w in zip(f(backend, *(t + h * d for t, d in zip(leaves, direction))), weights))

    h = 1e-6
    assert_close(slope, (value(h) - value(-h)) / (2 * h), 1e-6)


@every_backend
@pytest.mark.parametrize("name", DIFFERENTIABLE[:3])  # the projectors round each layer in an autograd.Function: no forward mode, see 12
def test_13_adjoint_identity(backend, name):
    """<v, J u> = <J^T v, u>, with J u from forward-mode differentiation of the reference."""
    f, leaves = differentiable(name)
    leaves = [t.detach() for t in leaves]
    u = [torch.randn_like(t) for t in leaves]
    outs, ju = torch.func.jvp(lambda *t: f("reference", *t), tuple(leaves), tuple(u))
    v = [torch.randn_like(o) for o in outs]
    live = [t.requires_grad_() for t in leaves]
    jtv = torch.autograd.grad(f(backend, *live), live, v)
    left, right = sum((a * b).sum() for a, b in zip(v, ju)), sum((a * b).sum() for a, b in zip(jtv, u))
    assert_close(right, left, GRADIENT[torch.float64] * 100)  # one dot product of a few hundred terms


# --- 14..16: memory --------------------------------------------------------------------------------------------------


@every_backend
@every_call
def test_14_nan_stays_in_its_row_and_channel(backend, name):
    case, _ = CALLS[name]
    first = "x" if "x" in case.kwargs else "u"
    x = case.kwargs[first].clone()
    x[1, 3] = float("nan")
    clean, poisoned = run(case, backend), run(case._replace(kwargs={**case.kwargs, first: x}), backend)
    for a, b in zip(clean, poisoned):
        mask = torch.ones_like(a, dtype=torch.bool)
        mask[(1,) if name == "rms_norm" else (1, 3)] = False  # a norm mixes the channels of a row
        assert torch.equal(a[mask], b[mask]) and not torch.equal(a, b)


@every_backend
@every_call
@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 33])
def test_15_every_element_of_every_output_is_written(backend, name, seqlen):
    case, _ = CALLS[name]
    if name == "selective_scan" or name == "causal_conv1d":
        case = case._replace(kwargs=steps(case.kwargs, slice(0, seqlen)))
    torch.use_deterministic_algorithms(True)  # torch.empty comes filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        outs = run(case, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(o.isnan().any() for o in outs)


@every_backend
@every_call
def test_16_inputs_are_not_written(backend, name):
    case, _ = CALLS[name]
    tensors = {k: v for k, v in case.kwargs.items() if isinstance(v, torch.Tensor) and k not in case.in_place}
    before = {k: v.clone() for k, v in tensors.items()}
    outs = run(case, backend)
    assert all(torch.equal(tensors[k], before[k]) for k in tensors)
    storages = {t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}
    assert storages.isdisjoint(o.untyped_storage().data_ptr() for o in outs if o.numel() and name != "rms_norm")


# --- a missing tensor ------------------------------------------------------------------------------------------------

REQUIRED = {
    "rms_norm": (selfcheck.rms_norm_inputs, ("x", "weight")),
    "causal_conv1d": (selfcheck.causal_conv1d_inputs, ("x", "weight")),
    "causal_conv1d_update": (selfcheck.causal_conv1d_update_inputs, ("x", "conv_state", "weight")),
    "selective_scan": (selfcheck.selective_scan_inputs, ("u", "delta", "A", "B", "C")),
    "selective_state_update": (selfcheck.selective_state_update_inputs, ("state", "x", "dt", "A", "B", "C")),
}


@pytest.mark.parametrize("op, name", [(op, name) for op, (_, names) in REQUIRED.items() for name in names])
@pytest.mark.parametrize("value", [None, [1.0]], ids=["None", "list"])
def test_what_is_not_a_tensor_is_refused_by_name(op, name, value):
    inputs = REQUIRED[op][0](generator())
    with pytest.raises(errors.DtypeError, match=rf"^{op}: {name} is {'None' if value is None else 'list'}|{name} has dtype"):
        getattr(cobra_kernels, op)(**{**inputs, name: value})
