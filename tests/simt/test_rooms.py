"""Every room's CUDA source, run on this CPU in every order, against fp64: guard bands, NaN-filled outputs, inputs unchanged."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.simt import harness

ROOMS = {path.stem.removeprefix("room_"): importlib.import_module(f"tests.simt.{path.stem}") for path in sorted(Path(__file__).parent.glob("room_*.py"))}
ALL = [pytest.param(room, case, id=f"{name}-{case.id}") for name, room in ROOMS.items() for case in room.CASES]
ON_CUDA = [p for p in ALL if "cuda" in harness.devices(p.values[0])]
ORDERS = {"forward": {}, "reverse": {"order": "reverse"}, "random": {"order": "random", "seed": 11}, "resident": {"order": "random", "resident": 3}}


@pytest.mark.parametrize("room, case", ON_CUDA)
def test_cuda_source(host, room, case):
    """One test runs all orders: a case costs milliseconds, a test's set-up does too."""
    for name, options in ORDERS.items():
        host.set_simt(**options, **({"max_grid_x": case.max_grid_x} if getattr(case, "max_grid_x", 0) else {}))
        try:
            room.check(host, case, "cuda")
        except (AssertionError, host.SimtFailure) as error:
            raise AssertionError(f"[order {name}] {error}") from error


@pytest.mark.parametrize("room, case", ALL)
def test_cpu_source(host, room, case):
    """The CPU kernels through the same list, at every level that this processor runs, with one and two threads."""
    before = host.cpu_level()
    for level in ("scalar", "avx2", "avx512"):
        if not host.set_cpu_level(level):
            continue
        for threads in (1, 2):
            host.set_threads(threads)
            try:
                room.check(host, case, "cpu")
            except AssertionError as error:
                raise AssertionError(f"[{level}, {threads} threads] {error}") from error
    host.set_cpu_level(before)


@pytest.mark.parametrize(
    "room, device", [pytest.param(room, device, id=f"{name}-{device}") for name, room in ROOMS.items() for device in harness.devices(room)]
)
def test_offsets_have_64_bits(host, room, device):
    try:
        room.check_large_strides(host, device)
    except harness.AddressSpaceRefused as refusal:
        pytest.skip(str(refusal))


def test_limits_are_those_of_the_test_suite():
    import torch

    from tests import tolerances

    torch_dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    assert {torch_dtypes[d]: limit for d, limit in harness.OUTPUT.items()} == tolerances.OUTPUT
    assert {torch_dtypes[d]: limit for d, limit in harness.GRADIENT.items()} == tolerances.GRADIENT


def test_the_harness_sees_what_it_should():
    """A stray write on either side, a touched input and an unwritten element are each reported."""
    import numpy as np

    for layout in harness.LAYOUTS[:-1]:
        tensor = harness.Tensor((3, 5), "fp32", layout)
        tensor.array[...] = 1.0
        harness.check_close(tensor, np.ones((3, 5)), 0.0, layout)
        inside = tensor.buffer.copy()
        for where in (0, harness.guard - 1, len(inside) - harness.guard, len(inside) - 1):
            tensor.buffer[:] = inside
            tensor.buffer[where] ^= 1
            with pytest.raises(AssertionError, match="wrote outside the tensor"):
                tensor.check_guards(layout)
        tensor.buffer[:] = inside
        tensor.array[2, 4] = np.nan
        with pytest.raises(AssertionError, match="1 of 15 elements are NaN"):
            harness.check_close(tensor, np.ones((3, 5)), 0.0, layout)
        with pytest.raises(AssertionError, match="wrote to an input"):
            tensor.check_unchanged(layout)
