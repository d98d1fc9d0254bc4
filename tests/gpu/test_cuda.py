"""What only a CUDA device can show: streams first, then graphs, then values. Skipped by name elsewhere.

`make gpu-sanitize` runs the tests whose names hold `sanitize` under the four compute-sanitizer tools.
"""

from __future__ import annotations

import pytest
import torch

import cobra_kernels
from cobra_kernels import rms_norm, selfcheck
from tests.conftest import kernel_backends
from tests.sampler import check, sample
from tests.tolerances import OUTPUT, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
BACKENDS = kernel_backends("cuda")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(rows=64, dim=2560, dtype=torch.bfloat16):
    made = selfcheck.rms_norm_inputs(torch.Generator().manual_seed(0), rows, dim, dtype)
    return {k: v.cuda() for k, v in made.items()}


def test_the_cuda_backend_is_there():
    assert "cuda" in BACKENDS, cobra_kernels.backends()["cuda"]


@every_backend
def test_runs_on_the_current_stream(backend):
    """The input is written late on a side stream: a kernel on the default stream would read the old values."""
    t = inputs()
    fresh = torch.randn_like(t["x"])
    expected = rms_norm(**{**t, "x": fresh}, backend=backend)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        t["x"].copy_(fresh)
        out = rms_norm(**t, backend=backend)
    stream.synchronize()
    assert torch.equal(out, expected)


@every_backend
def test_two_streams_do_not_disturb_each_other(backend):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    t = [inputs(rows=2048), inputs(rows=2048, dim=1536)]
    expected = [rms_norm(**a, backend=backend) for a in t]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[i].append(rms_norm(**t[i], backend=backend))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i]) for i in range(2) for out in outs[i])


@every_backend
def test_graph_capture_and_replay(backend):
    t = inputs()
    rms_norm(**t, backend=backend)  # Triton compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rms_norm(**t, backend=backend)
    for _ in range(3):
        t["x"].normal_()
        graph.replay()
        assert torch.equal(out, rms_norm(**t, backend=backend))


@every_backend
def test_compile_with_graphs(backend):
    t = inputs()
    f = torch.compile(lambda **a: rms_norm(**a, backend=backend).sin(), fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert_close(f(**t), rms_norm(**t, backend=backend).sin(), OUTPUT[torch.bfloat16])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(backend, dtype):
    t = {k: v.requires_grad_() for k, v in inputs(2100, 257, dtype).items()}
    y, s = rms_norm(**t, prenorm=True, backend=backend)
    douts = torch.randn_like(y), torch.randn_like(s)
    got = torch.autograd.grad((y, s), list(t.values()), douts)
    again = torch.autograd.grad(rms_norm(**t, prenorm=True, backend=backend), list(t.values()), douts)
    wide = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    want = torch.autograd.grad(rms_norm(**wide, prenorm=True, backend="reference"), list(wide.values()), [d.double() for d in douts])
    for g, a, w in zip(got, again, want):
        assert torch.equal(g, a)
        assert_close(g, w, {torch.float32: 1e-5}.get(g.dtype, OUTPUT[g.dtype]))


@every_backend
def test_more_than_2_31_elements(backend):
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    rows, dim = 2**20 + 3, 2049
    x = torch.empty(rows, dim, device="cuda", dtype=torch.bfloat16).normal_()
    y = rms_norm(x, torch.ones(dim, device="cuda"), backend=backend)
    assert torch.equal(y[-5:], rms_norm(x[-5:].clone(), torch.ones(dim, device="cuda"), backend=backend))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_backend
def test_tensor_on_the_other_device(backend):
    t = {k: v.to("cuda:1") for k, v in inputs().items()}
    with torch.cuda.device(0):
        out = rms_norm(**t, backend=backend)
    assert out.device == torch.device("cuda:1")


def cases(count: int):
    """The first `count` seeded cases of the ops that have this backend, on the device."""
    found = []
    seed = 0
    while len(found) < count:
        case = sample(seed)
        seed += 1
        if case.op == "rms_norm" and case.kwargs["x"].dtype != torch.float64:
            moved = {k: selfcheck.map_tensors(v, lambda t: t.cuda()) for k, v in case.kwargs.items()}
            found.append(case._replace(kwargs=moved))
    return found


@every_backend
def test_sanitize_boundary_cases(backend):
    for case in cases(300 if backend == "cuda" else 40):
        check(case, backend)
