"""What only a CUDA device can show, for every op on every GPU backend: streams first, then graphs, sizes and values.

Without a device the tests of `cuda` and `triton` are skipped by name, and the `rehearsal` runs their bodies on the cpu backend.
`make gpu-sanitize` runs the tests whose names hold `sanitize` under the four compute-sanitizer tools.
"""

from __future__ import annotations

import pytest
import torch

import cobra_kernels
from cobra_kernels import selfcheck
from cobra_kernels.selfcheck import Case
from tests.gpu import cases
from tests.gpu.cases import CALLS, GEMM_OPS, OPS, make, placed, refill
from tests.gpu.machine import Cuda, Rehearsal
from tests.sampler import check, check_gradients, describe, has_gradients
from tests.tolerances import OUTPUT, relative_error

pytestmark = pytest.mark.gpu
every_op = pytest.mark.parametrize("op", OPS)
every_call = pytest.mark.parametrize("op", CALLS)  # mamba_inner and backwards too
SHARDS = 8
SANITIZED = {"cuda": 320, "triton": 40, "cpu": 32}  # boundary cases; Triton compiles a variant for most of them
SAMPLED = {"cuda": 1600, "triton": 240, "cpu": 64}
SAMPLED_GRADIENTS = {"cuda": 640, "triton": 80, "cpu": 32}
MANY = 65_537  # one more than the limit of a grid's y and z
FIRST_ELEMENTS_OF_INT64 = 2**31


@pytest.fixture(params=["cuda", "triton", "rehearsal"])
def gpu(request):
    """The device and backend of a test, skipped by name where it is not there."""
    there = torch.cuda.is_available()
    if request.param == "rehearsal":
        if there:
            pytest.skip("a CUDA device is there: nothing to rehearse")
        if cobra_kernels.backends()["cpu"] is not None:
            pytest.skip(f"no compiled kernels: {cobra_kernels.backends()['cpu']}")
        return Rehearsal()
    if not there:
        pytest.skip("torch sees no CUDA device")
    reason = cobra_kernels.backends()[request.param]
    assert request.param != "cuda" or reason is None, reason
    if reason is not None:
        pytest.skip(reason)
    return Cuda(request.param)


def on(gpu: Cuda, op: str, batch: int = 2, seed: int = 0) -> Case:
    """A call of users' size on the device."""
    return placed(make(op, batch, gpu.large, seed), gpu.put)


def run(case: Case, gpu: Cuda) -> list[torch.Tensor]:
    """Outputs, then the arguments that were written; the case is left as it was."""
    return selfcheck.run(case, gpu.backend)


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor], op: str, what: str = "") -> None:
    """The same bits from our own kernels; a library's GEMM may pick another split of its sums."""
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape and g.dtype == w.dtype
        if op.split("-")[0] in GEMM_OPS:
            error = relative_error(g, w)
            assert error <= 2 * OUTPUT[w.dtype], f"{what} output {index}: L2-relative error {error:.2e}"
        else:
            assert torch.equal(g, w), f"{what} output {index}: L2-relative error {relative_error(g, w):.2e}, expected the same bits"


@every_op
def test_every_op_has_a_kernel(gpu, op):
    case = on(gpu, op)
    served, reason = cobra_kernels.supports(op, **case.kwargs, backend=gpu.backend)
    assert served, reason


# --- streams ---------------------------------------------------------------------------------------------------------


@every_call
def test_runs_on_the_current_stream(gpu, op):
    """The inputs are written late on a side stream: a kernel on the default stream would read the old values."""
    case, fresh = on(gpu, op), on(gpu, op, seed=1)
    expected = run(fresh, gpu)
    (stream,) = gpu.streams(1)
    gpu.synchronize()
    with stream():
        gpu.occupy()
        refill(case, fresh)
        got = run(case, gpu)
    gpu.synchronize()
    assert_same(got, expected, op)


@every_call
def test_two_streams_do_not_disturb_each_other(gpu, op):
    """Shared workspaces and flags would: two calls of different sizes run side by side, again and again."""
    streams = gpu.streams(2)
    pair = [on(gpu, op, batch=1), on(gpu, op, batch=3, seed=1)]
    expected = [run(case, gpu) for case in pair]
    gpu.synchronize()
    outputs: list[list[list[torch.Tensor]]] = [[], []]
    for _ in range(20):
        for stream, case, kept in zip(streams, pair, outputs):
            with stream():
                kept.append(run(case, gpu))
    gpu.synchronize()
    for index in range(2):
        for got in outputs[index]:
            assert_same(got, expected[index], op, f"stream {index}")


@every_call
def test_the_host_never_waits(gpu, op):
    case = on(gpu, op)
    run(case, gpu)
    with gpu.no_synchronisation():
        run(case, gpu)


@every_op
def test_tensors_on_the_other_device(gpu, op):
    if gpu.large and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = "cuda:1" if gpu.large else "cpu"
    case = placed(make(op, 2, gpu.large), lambda t: t.to(other))
    outputs = run(case, gpu)  # the current device is 0
    assert all(t.device == torch.device(other) for t in outputs)
    assert_same([t.cpu() for t in outputs], [t.cpu() for t in run(on(gpu, op), gpu)], op)


# --- graphs ----------------------------------------------------------------------------------------------------------


@every_call
def test_graph_capture_and_replay(gpu, op):
    case = on(gpu, op)
    replay, outputs = gpu.capture(lambda: run(case, gpu))
    for seed in (1, 2, 3):
        refill(case, on(gpu, op, seed=seed))
        expected = run(case, gpu)
        replay()
        gpu.synchronize()
        assert_same(outputs, expected, op, f"replay {seed}")


@every_call
def test_graphs_of_batch_1_then_4_then_1(gpu, op):
    """What a server does: a graph for each batch size, and eager calls between the replays."""
    held = {batch: on(gpu, op, batch) for batch in (1, 4)}
    graphs = {batch: gpu.capture(lambda case=case: run(case, gpu)) for batch, case in held.items()}
    for seed, batch in enumerate((1, 4, 1, 4, 1), 1):
        case, (replay, outputs) = held[batch], graphs[batch]
        refill(case, on(gpu, op, batch, seed))
        replay()
        gpu.synchronize()
        got = [t.clone() for t in outputs]
        assert_same(got, run(case, gpu), op, f"batch {batch}")


@every_op
def test_compiled_with_graphs(gpu, op):
    """torch.compile(mode="reduce-overhead"): other kernels around ours, all in a graph."""
    case = on(gpu, op)
    options = {k: v for k, v in case.kwargs.items() if not isinstance(v, (torch.Tensor, tuple)) or k in ("grid", "out_grid")}
    tensors = {k: v for k, v in case.kwargs.items() if k not in options}
    function = getattr(cobra_kernels, op)

    @gpu.compile
    def f(**tensors):
        out = function(**tensors, **options, backend=gpu.backend)
        return [t * 2 for t in (out if isinstance(out, tuple) else (out,))]

    for seed in range(3):
        refill(case, on(gpu, op, seed=seed))
        outputs = run(case, gpu)
        expected = [t * 2 for t in outputs[: len(outputs) - len(case.in_place)]]
        gpu.next_iteration()
        got = [t.clone() for t in f(**{k: v.clone() if k in case.in_place else v for k, v in tensors.items()})]
        assert_same(got, expected, op)


# --- sizes -----------------------------------------------------------------------------------------------------------


@every_op
def test_more_than_2_31_elements(gpu, op):
    """The last rows or channels of a tensor whose offsets need 64 bits, against a call of their own."""
    if gpu.free_bytes() < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    elements, narrow = (FIRST_ELEMENTS_OF_INT64, 2048) if gpu.large else (4000, 48)
    case = cases.with_elements(op, elements, narrow, gpu.device)
    tail = cases.tail_of(case)
    # In place, without the copy that `run` makes: the written tensor is the large one.
    out = getattr(cobra_kernels, op)(**case.kwargs, backend=gpu.backend)
    outputs = [*(out if isinstance(out, tuple) else (out,)), *(case.kwargs[name] for name in case.in_place)]
    for index, (got, want) in enumerate(zip(cases.tail_of_outputs(case, outputs), run(tail, gpu), strict=True)):
        error = relative_error(got, want)  # a few rows or channels may take another path through the kernels
        assert error <= 2 * OUTPUT[got.dtype], f"output {index}: L2-relative error {error:.2e}"


LIMITS_OF_A_GRID = {
    "rms_norm": lambda g: selfcheck.rms_norm_inputs(g, MANY, 8),
    "rms_norm-wide": lambda g: selfcheck.rms_norm_inputs(g, 2, MANY),
    "causal_conv1d": lambda g: selfcheck.causal_conv1d_inputs(g, 1, MANY, 5),
    "causal_conv1d-batch": lambda g: selfcheck.causal_conv1d_inputs(g, MANY, 2, 5),
    "causal_conv1d_update": lambda g: selfcheck.causal_conv1d_update_inputs(g, 1, MANY),
    "causal_conv1d_update-batch": lambda g: selfcheck.causal_conv1d_update_inputs(g, MANY, 3),
    "selective_scan": lambda g: selfcheck.selective_scan_inputs(g, 1, MANY, 3, 4),
    "selective_scan-batch": lambda g: selfcheck.selective_scan_inputs(g, MANY, 2, 3, 4),
    "selective_state_update": lambda g: selfcheck.selective_state_update_inputs(g, 1, MANY, 4),
    "selective_state_update-batch": lambda g: selfcheck.selective_state_update_inputs(g, MANY, 3, 4),
    "mlp_projector": lambda g: selfcheck.mlp_projector_inputs(g, (MANY,), (3,), (4, 5)),
    "mlp_projector-wide": lambda g: selfcheck.mlp_projector_inputs(g, (3,), (8,), (MANY,)),
    "ldp_projector": lambda g: selfcheck.ldp_projector_inputs(g, MANY, (2, 2), (1, 1), (3,), (4, 5)),
}


@pytest.mark.parametrize("name", LIMITS_OF_A_GRID)
def test_more_than_a_grid_dim_holds(gpu, name):
    op = name.split("-")[0]
    case = Case(op, LIMITS_OF_A_GRID[name](torch.Generator().manual_seed(0)), cases.IN_PLACE.get(op, ()))
    check(placed(case, gpu.put), gpu.backend)


# --- values ----------------------------------------------------------------------------------------------------------


def check_all(gpu: Cuda, count: int, shard: int, check=check) -> None:
    """Every shards-th of `count` seeded boundary cases, in their own layouts; all failures are reported, with their seeds."""
    failures = []
    for seed, case in cases.sampled(count, shard, SHARDS):
        if check is check_gradients and not has_gradients(case):
            continue
        try:
            check(placed(case, gpu.put), gpu.backend)
        except Exception as error:
            failures.append(f"python -m tests.sampler {seed}   {type(error).__name__}: {error}\n{describe(case)}")
    assert not failures, f"{len(failures)} cases:\n" + "\n".join(failures[:3])


@pytest.mark.parametrize("shard", range(SHARDS))
def test_sampled_cases(gpu, shard):
    check_all(gpu, SAMPLED[gpu.backend], shard)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_sampled_gradients(gpu, shard):
    check_all(gpu, SAMPLED_GRADIENTS[gpu.backend], shard, check_gradients)


@pytest.mark.parametrize("shard", range(SHARDS), ids=lambda shard: f"shard{shard}")
def test_sanitize_boundary_cases(gpu, shard, monkeypatch):
    """Without the NaN fill of `check`: memory that nothing wrote must look so to initcheck."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    check_all(gpu, SANITIZED[gpu.backend], shard)


@pytest.mark.parametrize("shard", range(SHARDS), ids=lambda shard: f"shard{shard}")
def test_sanitize_gradients(gpu, shard, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    check_all(gpu, SANITIZED[gpu.backend] // 2, shard, check_gradients)


@every_call
def test_sanitize_users_sizes(gpu, op):
    """The fast paths: shapes that users run, small enough for a sanitizer."""
    if gpu.large:
        case = placed(make(op, 1, large=op not in ("mlp_projector", "ldp_projector")), gpu.put)
    else:
        case = on(gpu, op, batch=1)
    first, second = run(case, gpu), run(case, gpu)
    gpu.synchronize()
    assert_same(first, second, op)


@pytest.mark.parametrize("op", cases.TRAINED)
def test_gradients_of_users_shapes(gpu, op):
    """bf16 and channel-last as a model calls it, small, against the reference in fp64."""
    case = make(op, 2, large=False)
    outputs = len(run(placed(case._replace(gradients=False), gpu.put), gpu))
    got, want = run(placed(case, gpu.put), gpu), selfcheck.expected(case)
    for index, (g, w) in enumerate(zip(got[outputs:], want[outputs:], strict=True)):
        # Behind a product in bf16 its rounding counts too.
        limit = 2e-2 if case.op in GEMM_OPS else {torch.float32: 1e-5}.get(g.dtype, OUTPUT[g.dtype])
        assert relative_error(g.cpu(), w) <= limit, f"gradient {index}: L2-relative error {relative_error(g.cpu(), w):.2e}"


def test_language_model(gpu):
    """Prefill, decode and gradients of a small Mamba on the device, against the same weights on the CPU; and decode in a graph."""
    from cobra_kernels.modules import MambaConfig, MambaLMHeadModel

    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=64, n_layer=2, vocab_size=96)).eval()
    ids = torch.randint(96, (3, 70))

    def gradients(ids):
        return torch.autograd.grad(model(ids).logits.square().mean(), list(model.parameters()))

    want_gradients = gradients(ids)
    model.requires_grad_(False)
    want, state = model.prefill(ids)
    want_next = model.decode(want.argmax(-1), state)
    token = want.argmax(-1).to(gpu.device)
    model.to(gpu.device)
    with cobra_kernels.use_backend(gpu.backend):
        got, state = model.prefill(ids.to(gpu.device))
        before = state.clone()
        got_next = model.decode(token, state)
        replay, (logits,) = gpu.capture(lambda: [model.decode(token, state)])
        state.copy_(before)
        replay()
        model.requires_grad_(True)
        got_gradients = gradients(ids.to(gpu.device))
    gpu.synchronize()
    for what, g, w in (("prefill", got, want), ("decode", got_next, want_next), ("decode in a graph", logits, want_next)):
        assert relative_error(g.cpu(), w) <= 1e-4, f"{what}: {relative_error(g.cpu(), w):.2e}"
    for (name, _), g, w in zip(model.named_parameters(), got_gradients, want_gradients, strict=True):
        assert relative_error(g.cpu(), w) <= 1e-4, f"gradient of {name}: {relative_error(g.cpu(), w):.2e}"
