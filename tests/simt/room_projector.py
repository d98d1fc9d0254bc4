"""The projector's kernels on numpy arrays: cases, and one function that checks a case (see room_rms_norm.py).

Three kinds of case: the passes around a matrix product and their backward, on both devices, and the linear layer, whose kernel is a
GPU's; on "cpu" its cases check how the work is shared out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close

# KB of shared memory of a multiprocessor, and blocks of the warps' kernel (4 stages of 16 KB and a table) that it holds.
ARCHITECTURES = {"sm_80": (164, 2), "sm_86": (100, 1), "sm_89": (100, 1), "sm_90a": (228, 2), "sm_100": (228, 2), "sm_120": (100, 1)}
TILES = {False: (128, 128, 32, 2), True: (128, 256, 64, 1)}  # warpgroups: rows, columns, depth, blocks (csrc/projector/projector.h)


def identity(case: NamedTuple, prefix: str = "") -> str:
    changed = "-".join(f"{k}={v}" for k, v in case._asdict().items() if v != case._field_defaults[k]).replace(" ", "")
    return prefix + (changed or "base")


class Case(NamedTuple):
    """The passes: the base case; each row of PASSES varies one thing."""

    batch: int = 2
    grid: tuple[int, int] = (5, 7)
    out_grid: tuple[int, int] = (3, 4)
    channels: int = 40
    dtype: str = "fp32"
    round_dtype: str = ""  # empty: as dtype
    bias_dtype: str | None = ""  # None: no bias
    max_grid_x: int = 0  # 0: as the GPU

    @property
    def id(self) -> str:
        return identity(self)


class Linear(NamedTuple):
    """The linear layer: the base case; each row of LINEARS varies one thing."""

    lead: tuple[int, ...] = (37,)
    widths: tuple[int, ...] = (64, 40)
    cols: int = 72
    dtype: str = "bf16"
    bias_dtype: str | None = "fp32"  # None: no bias
    gelu: bool = True
    split: int = 1
    whole_tiles: int = 0  # with split > 1: how many tiles are not split
    layout: str = "contiguous"
    infinite: bool = False  # an infinite weight where the second segment begins
    warpgroups: bool = False
    unrounded: bool = False  # the result is fp32

    @property
    def id(self) -> str:
        return identity(self, "linear-")


class Gelu(NamedTuple):
    """The backward of bias and GELU: the base case; each row of GELUS varies one thing."""

    lead: tuple[int, ...] = (37,)
    cols: int = 40
    dtype: str = "fp32"  # of what arrives
    bias_dtype: str | None = ""  # None: no bias
    dz_dtype: str | None = ""  # None: not wanted
    dbias_dtype: str | None = ""  # None: not wanted
    sums: bool = True  # False: no GELU
    layout: str = "contiguous"
    max_grid_x: int = 0

    @property
    def id(self) -> str:
        return identity(self, "gelu_bwd-")


class Pool(NamedTuple):
    """The backward of bias, GELU and pool."""

    batch: int = 2
    grid: tuple[int, int] = (5, 7)
    out_grid: tuple[int, int] = (3, 4)
    channels: int = 40
    dtype: str = "fp32"
    dz_dtype: str | None = ""
    dbias_dtype: str | None = ""
    max_grid_x: int = 0

    @property
    def id(self) -> str:
        return identity(self, "pool_bwd-")


class Peg(NamedTuple):
    """The backward of the encoding."""

    batch: int = 2
    grid: tuple[int, int] = (3, 4)
    channels: int = 40
    dtype: str = "fp32"
    weight_dtype: str = ""
    wanted: str = "dp dweight dbias dp_bias"
    p_bias: bool = True
    layout: str = "contiguous"
    max_grid_x: int = 0

    @property
    def id(self) -> str:
        return identity(self, "peg_bwd-")


PASSES = [
    Case(),
    *(Case(channels=c) for c in (0, 1, 7, 15, 16, 17, 255, 256, 257, 513)),
    *(Case(channels=c, grid=(2, 3), out_grid=(2, 2), dtype=d) for c, d in ((1032, "bf16"), (260, "fp16"))),
    *(Case(grid=g, out_grid=o, channels=17) for g, o in (((1, 1), (1, 1)), ((1, 1), (3, 2)), ((2, 3), (5, 5)), ((1, 9), (1, 4)), ((5, 7), (5, 7)),
                                                         ((8, 8), (4, 4)), ((9, 9), (1, 1)), ((27, 27), (14, 14)))),
    *(Case(batch=b) for b in (0, 1)),
    *(Case(dtype=d) for d in ("bf16", "fp16", "fp64")),
    *(Case(round_dtype=r, bias_dtype=r) for r in ("bf16", "fp16")),
    Case(bias_dtype=None),
    Case(dtype="bf16", bias_dtype=None),
    *(Case(channels=c, max_grid_x=3) for c in (17, 40)),
    Case(channels=1032, grid=(2, 3), out_grid=(2, 2), max_grid_x=3),
]  # fmt: skip
# Sizes on both sides of a tile (128 x 128), of a step (32 channels) and of the ring of four stages; every tail of 8.
OF_WARPS = [
    Linear(),
    *(Linear(lead=(rows,)) for rows in (0, 1, 2, 127, 128, 129)),
    *(Linear(cols=cols) for cols in (0, 1, 4, 7, 8, 65, 127, 128, 129, 130, 132)),
    *(Linear(widths=w) for w in ((), (8,), (24,), (32,), (40,), (96,), (128,), (136,), (264,), (8, 8), (64, 32), (8, 48, 16), (56, 8, 40, 8))),
    *(Linear(lead=lead, cols=cols, widths=(40,)) for lead, cols in (((130,), 260), ((260,), 100))),
    *(Linear(dtype="fp16", bias_dtype=b, gelu=g) for b, g in (("fp16", True), ("bf16", False))),
    *(Linear(bias_dtype=b, gelu=g) for b, g in ((None, False), (None, True), ("bf16", False))),
    *(Linear(widths=w, split=s) for w, s in (((64, 40), 2), ((64, 40), 4), ((264,), 3), ((24, 72, 136), 5), ((8,), 2))),
    *(Linear(lead=(130,), cols=c, split=s, whole_tiles=t) for c, s, t in ((129, 2, 0), (129, 2, 1), (260, 3, 4), (130, 3, 3))),
    Linear(split=3, dtype="fp16", bias_dtype=None, gelu=False, cols=70),
    *(Linear(lead=(5, 3, 3), layout=x) for x in ("padded", "transposed", "expanded")),
    Linear(lead=(2, 70), layout="padded", cols=130, split=2, whole_tiles=2),
    Linear(infinite=True, gelu=False, widths=(40, 24)),
    *(Linear(unrounded=True, gelu=False, cols=cols, split=s) for cols, s in ((72, 1), (70, 1), (72, 2))),
]  # fmt: skip
# The same for tiles of 128 x 256 and steps of 64 channels; what the two kernels share is not repeated.
OF_WARPGROUPS = [case._replace(warpgroups=True) for case in (
    Linear(),
    *(Linear(lead=(rows,)) for rows in (1, 128, 129)),
    *(Linear(cols=cols) for cols in (1, 7, 132, 255, 256, 257)),
    *(Linear(widths=w) for w in ((), (8,), (64,), (72,), (128, 64), (136, 8, 56), (520,))),
    Linear(dtype="fp16", gelu=False, bias_dtype=None),
    *(Linear(widths=w, split=s) for w, s in (((264,), 3), ((24, 72, 136), 4))),
    *(Linear(lead=(130,), cols=260, split=2, whole_tiles=t) for t in (0, 3)),
    Linear(lead=(5, 3, 3), layout="padded"),
    Linear(infinite=True, gelu=False, widths=(40, 24)),
)]  # fmt: skip
LINEARS = [*OF_WARPS, *OF_WARPGROUPS]
# Vectors of 8 and single channels, every tail of a CPU's vectors and column tiles, blocks of rows on both sides of 16 and of 128 * 16.
GELUS = [
    Gelu(),
    *(Gelu(cols=c) for c in (0, 1, 7, 8, 17, 255, 256, 257, 1032)),
    *(Gelu(lead=(rows,), cols=c) for rows in (0, 1, 15, 16, 17, 33) for c in (8, 9)),
    Gelu(lead=(2100,), cols=8),
    Gelu(lead=(2100,), cols=3),
    *(Gelu(dtype=d, dz_dtype=z, dbias_dtype=b, bias_dtype=b) for d, z, b in (
        ("bf16", "", ""), ("fp16", "", ""), ("fp64", "", ""), ("fp32", "bf16", "fp16"), ("fp32", "fp16", "bf16"), ("bf16", "fp32", "fp32"))),
    Gelu(bias_dtype=None),
    *(Gelu(dz_dtype=z, dbias_dtype=b, cols=c) for z, b in ((None, ""), ("", None), (None, None)) for c in (40, 41)),
    *(Gelu(lead=(5, 6), layout=x, sums=s, bias_dtype="" if s else None, cols=c, dtype=d)
      for x in ("padded", "transposed", "sliced", "unaligned", "strided", "expanded") for s, c, d in ((False, 24, "bf16"), (True, 33, "fp32"))),
    Gelu(sums=False, bias_dtype=None, dz_dtype=None),
    *(Gelu(lead=(70,), cols=c, max_grid_x=2) for c in (40, 41, 200)),
    *(Gelu(lead=(5, 6), dtype="fp64", cols=c, layout=x, sums=s, bias_dtype="" if s else None)
      for c, x in ((41, "contiguous"), (24, "padded"), (24, "strided")) for s in (True, False)),
]  # fmt: skip
POOLS = [
    Pool(),
    *(Pool(channels=c) for c in (0, 1, 8, 17, 257)),
    *(Pool(grid=g, out_grid=o, channels=c) for g, o, c in (((1, 1), (1, 1), 17), ((1, 1), (3, 2), 17), ((2, 3), (5, 5), 16), ((1, 9), (1, 4), 17),
                                                           ((5, 7), (5, 7), 8), ((8, 8), (4, 4), 9), ((9, 9), (1, 1), 8), ((3, 4), (7, 9), 8),
                                                           ((27, 27), (14, 14), 8), ((1, 32768), (1, 3), 1), ((1, 5), (1, 32770), 1))),
    *(Pool(batch=b) for b in (0, 1)),
    *(Pool(dtype=d) for d in ("bf16", "fp16", "fp64")),
    *(Pool(dz_dtype=z, dbias_dtype=b) for z, b in ((None, ""), ("", None), ("bf16", "fp16"))),
    *(Pool(channels=c, max_grid_x=3) for c in (17, 40)),
    *(Pool(dtype="fp64", channels=c) for c in (17, 40)),
]  # fmt: skip
PEGS = [
    Peg(),
    *(Peg(channels=c) for c in (0, 1, 4, 17, 255, 257)),
    Peg(channels=260, grid=(2, 2), dtype="bf16"),
    *(Peg(grid=g, channels=c) for g in ((1, 1), (1, 7), (7, 1), (2, 2), (14, 14)) for c in (8, 9)),
    *(Peg(batch=b, channels=c) for b in (0, 1, 140) for c in (4, 5)),
    *(Peg(dtype=d, weight_dtype=w) for d, w in (("bf16", ""), ("fp16", ""), ("fp64", ""), ("bf16", "fp32"), ("fp32", "fp16"))),
    *(Peg(wanted=w, channels=c) for w in ("dp", "dweight", "dbias", "dp_bias", "dp dp_bias", "dweight dbias", "") for c in (8, 9)),
    Peg(p_bias=False),
    *(Peg(layout=x, dtype=d) for x in ("padded", "transposed", "sliced", "unaligned", "strided", "expanded") for d in ("fp32", "bf16")),
    *(Peg(channels=c, max_grid_x=2) for c in (40, 41)),
    *(Peg(dtype="fp64", channels=c, p_bias=b) for c in (8, 9) for b in (True, False)),
]  # fmt: skip
BACKWARD = [*GELUS, *POOLS, *PEGS]
CASES = [*PASSES, *BACKWARD, *LINEARS]
# A matrix product is 500 times slower under a sanitizer than on its own: one case of each path.
SANITIZED = [*PASSES, *(c for i, c in enumerate(BACKWARD) if i % 3 == 0 or getattr(c, "layout", "contiguous") != "contiguous"), *(c for c in OF_WARPS if c.lead[0] * c.cols <= 37 * 72 and sum(c.widths) <= 104), OF_WARPS[-2],
             *(OF_WARPGROUPS[i] for i in (0, 2, 9, 15, 19))]  # fmt: skip


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape)


def pool(x: np.ndarray, grid: tuple[int, int], out_grid: tuple[int, int]) -> np.ndarray:
    """(batch, H*W, channels) -> (batch, h*w, channels)."""
    x = x.reshape(x.shape[0], *grid, x.shape[2])
    for axis, (n, m) in enumerate(zip(grid, out_grid), 1):
        bins = [np.take(x, range(i * n // m, -(-(i + 1) * n // m)), axis).mean(axis) for i in range(m)]
        x = np.stack(bins, axis)
    return x.reshape(x.shape[0], out_grid[0] * out_grid[1], x.shape[3])


def peg(p: np.ndarray, weight: np.ndarray, bias: np.ndarray | float, grid: tuple[int, int]) -> np.ndarray:
    image = np.pad(p.reshape(p.shape[0], *grid, p.shape[2]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [weight[:, 0, i, j] * image[:, i : i + grid[0], j : j + grid[1]] for i in range(3) for j in range(3)]
    return p + (sum(taps) + bias).reshape(p.shape)


def gelu_slope(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) + v * math.exp(-0.5 * v * v) / math.sqrt(2 * math.pi) for v in x.ravel()]).reshape(x.shape)


def pool_matrix(n: int, m: int) -> np.ndarray:
    """(m, n): row i is the mean over bin i."""
    matrix = np.zeros((m, n))
    for i in range(m):
        begin, end = i * n // m, -(-(i + 1) * n // m)
        matrix[i, begin:end] = 1 / (end - begin)
    return matrix


def check(host, case: NamedTuple, device: str) -> None:
    if type(case) is Case and case.dtype == "fp64" and device == "cuda":
        return  # served by the CPU only; the emulator runs the source of the backward in double
    checks = {Case: check_passes, Gelu: check_gelu_bwd, Pool: check_pool_bwd, Peg: check_peg_bwd}
    if type(case) in checks:
        checks[type(case)](host, case, device)
    elif device == "cuda":
        check_linear(host, case)
    else:
        check_plan(host, case)


def check_passes(host, case: Case, device: str) -> None:
    """The three passes of one case against fp64, inputs unchanged, guards whole, outputs written."""
    rng = np.random.default_rng(0)
    tokens, round_dtype = case.grid[0] * case.grid[1], case.round_dtype or case.dtype
    limit = harness.OUTPUT[round_dtype]
    like = np.empty(0, harness.DTYPES[round_dtype])

    def make(shape, dtype):
        return Tensor(shape, dtype, "contiguous", rng.standard_normal(shape))

    bias = None if case.bias_dtype is None else make((case.channels,), case.bias_dtype or case.dtype)
    bias_array, bias_values = (None, 0.0) if bias is None else (bias.array, bias.values())
    hidden = make((case.batch, tokens, case.channels), case.dtype)
    expected = gelu(hidden.values() + bias_values)

    h = Tensor((case.batch * tokens, case.channels), case.dtype, "contiguous", hidden.values().reshape(case.batch * tokens, case.channels))
    y = Tensor(h.array.shape, round_dtype)
    host.projector_bias_gelu(device, h.array, bias_array, y.array, like)
    check_close(y, expected.reshape(h.array.shape), limit, "bias_gelu")
    h.check_unchanged("h")
    host.projector_bias_gelu(device, h.array, bias_array, h.array, like)  # in place
    check_close(h, expected.reshape(h.array.shape), limit, "bias_gelu in place")

    pooled = Tensor((case.batch, case.out_grid[0] * case.out_grid[1], case.channels), case.dtype)
    host.projector_gelu_pool(device, hidden.array, bias_array, *case.grid, *case.out_grid, pooled.array, like, True)
    check_close(pooled, pool(expected, case.grid, case.out_grid), limit, "gelu_pool")
    plain = Tensor(pooled.array.shape, round_dtype)
    host.projector_gelu_pool(device, hidden.array, None, *case.grid, *case.out_grid, plain.array, like, False)
    check_close(plain, pool(hidden.values(), case.grid, case.out_grid), limit, "pool without gelu")
    hidden.check_unchanged("hidden")

    weight = make((case.channels, 1, 3, 3), round_dtype)
    y, before = Tensor(pooled.array.shape, round_dtype), pooled.array.copy()
    host.projector_peg(device, pooled.array, weight.array, bias_array, *case.out_grid, y.array)
    check_close(y, peg(pooled.values(), weight.values(), bias_values, case.out_grid), limit, "peg")
    assert np.array_equal(pooled.array.view("u1"), before.view("u1"))
    weight.check_unchanged("weight")
    if bias:
        bias.check_unchanged("bias")


def check_linear(host, case: Linear) -> None:
    """One linear layer against fp64: inputs unchanged, guards whole, output and workspace written where they should be."""
    rng = np.random.default_rng(0)
    depth, rows = sum(case.widths), int(np.prod(case.lead))
    x = [Tensor((*case.lead, width), case.dtype, case.layout, rng.standard_normal((*case.lead, width))) for width in case.widths]
    if case.layout == "transposed":  # channels must be adjacent: the leading dims are what is transposed
        x = [Tensor(t.array.shape, case.dtype, "contiguous", t.values()) for t in x]
        for t in x:
            t.array = t.array.swapaxes(0, 1)
    values = rng.standard_normal((case.cols, depth)) / max(depth, 1) ** 0.5
    if case.infinite:
        values[0, case.widths[0]] = np.inf
    weight = Tensor((case.cols, depth), case.dtype, "padded" if case.layout == "padded" else "contiguous", values)
    bias = None if case.bias_dtype is None else Tensor((case.cols,), case.bias_dtype, "strided", rng.standard_normal(case.cols))
    y = Tensor((rows, case.cols), "fp32" if case.unrounded else case.dtype)

    tile_rows, tile_cols, _, _ = TILES[case.warpgroups]
    tiles = -(-rows // tile_rows) * -(-case.cols // tile_cols)
    whole = case.whole_tiles if case.split > 1 else tiles
    workspace = Tensor(((tiles - whole) * case.split * tile_rows * tile_cols,), "fp32") if case.split > 1 else None
    host.projector_linear([t.array for t in x], weight.array, bias and bias.array, y.array, case.gelu, case.warpgroups, whole,
                          case.split, workspace and workspace.array)  # fmt: skip

    flat = np.concatenate([np.zeros((rows, 0)), *(t.values().reshape(rows, t.array.shape[-1]) for t in x)], -1)
    if case.infinite:
        got = y.values()[:, 0]
        assert np.array_equal(got, np.sign(flat[:, case.widths[0]]) * np.inf), "an infinite weight reached another segment"
        weight.array[0, case.widths[0]] = 0
        y.array[:, 0] = 0
    expected = flat @ weight.values().T + (bias.values() if bias else 0)
    if case.infinite:
        expected[:, 0] = 0
    check_close(y, gelu(expected) if case.gelu else expected, harness.OUTPUT[y.dtype], "linear")
    if workspace:
        workspace.check_guards("workspace")
        assert not np.isnan(workspace.values()).any(), "the kernel left part of the workspace unwritten"
    for name, tensor in {"bias": bias, **{f"x[{i}]": t for i, t in enumerate(x)}}.items():
        if tensor:
            tensor.check_unchanged(name)
    if not case.infinite:
        weight.check_unchanged("weight")


def check_plan(host, case: Linear) -> None:
    """How the layer's tiles are shared out on the GPU of each architecture: every tile once, parts of at least four steps, a workspace that
    holds them; and a plan that takes fewer rounds than none."""
    rows, (tile_rows, tile_cols, depth, blocks) = int(np.prod(case.lead)), TILES[case.warpgroups]
    for factor in (1, 40):
        for multiprocessors, (name, (shared_kb, held)) in zip((1, 3, 84, 132, 148, 170), ARCHITECTURES.items()):
            m, n, widths = rows * factor, case.cols * factor, [width * factor for width in case.widths]
            steps = sum(-(-width // depth) for width in widths)
            tiles = -(-m // tile_rows) * -(-n // tile_cols)
            whole, split, elements, places = host.projector_linear_plan(m, n, widths, multiprocessors, shared_kb << 10, case.warpgroups)
            left = tiles - whole
            assert places == multiprocessors * min(blocks, held), name
            assert 0 <= whole <= tiles and elements == (left * split * tile_rows * tile_cols if split > 1 else 0)
            if split == 1:
                assert left == 0
            else:
                assert whole % places == 0 and 0 < left < places and steps >= 4 * split
                assert -(-left * split // places) * -(-steps // split) < steps


def check_gelu_bwd(host, case: Gelu, device: str) -> None:
    """dz and dbias of one case against fp64, and what is not wanted left alone."""
    rng = np.random.default_rng(0)
    compute, rows = "fp64" if case.dtype == "fp64" else "fp32", int(np.prod(case.lead))
    d = Tensor((*case.lead, case.cols), case.dtype, case.layout, rng.standard_normal((*case.lead, case.cols)))
    sums = Tensor((rows, case.cols), compute, "contiguous", 2 * rng.standard_normal((rows, case.cols))) if case.sums else None
    bias = None if case.bias_dtype is None else Tensor((case.cols,), case.bias_dtype or case.dtype, "strided", rng.standard_normal(case.cols))
    expected = d.values().reshape(rows, case.cols)
    if sums:
        expected = expected * gelu_slope(sums.values() + (bias.values() if bias else 0))
    check_sums_of_rows(host, case, device, d, sums, bias, [], expected, compute)


def check_pool_bwd(host, case: Pool, device: str) -> None:
    rng = np.random.default_rng(0)
    compute = "fp64" if case.dtype == "fp64" else "fp32"
    (height, width), (h, w) = case.grid, case.out_grid
    d = Tensor((case.batch, h * w, case.channels), case.dtype, "contiguous", rng.standard_normal((case.batch, h * w, case.channels)))
    shape = (case.batch, height * width, case.channels)
    sums = Tensor(shape, compute, "contiguous", 2 * rng.standard_normal(shape))
    bias = Tensor((case.channels,), case.dtype, "strided", rng.standard_normal(case.channels))
    spread = np.einsum("bijc,iy,jx->byxc", d.values().reshape(case.batch, h, w, case.channels), pool_matrix(height, h), pool_matrix(width, w))
    expected = spread.reshape(shape) * gelu_slope(sums.values() + bias.values())
    check_sums_of_rows(host, case, device, d, sums, bias, [height, width, h, w], expected.reshape(shape[0] * shape[1], shape[2]), compute)


def check_sums_of_rows(host, case: Gelu | Pool, device: str, d, sums, bias, grid, expected, compute) -> None:
    rows, cols = expected.shape
    dz = None if case.dz_dtype is None else Tensor((rows, cols), case.dz_dtype or case.dtype)
    dbias = None if case.dbias_dtype is None else Tensor((cols,), case.dbias_dtype or case.dtype)
    partial = Tensor((host.projector_sum_blocks(rows, 16) if dbias else 0, cols), compute)
    host.projector_gelu_bwd(device, d.array, sums and sums.array, bias and bias.array, grid, dz and dz.array, dbias and dbias.array, partial.array)
    for name, got, want in (("dz", dz, expected), ("dbias", dbias, expected.sum(0))):
        if got:
            check_close(got, want, harness.GRADIENT[got.dtype], name)
    partial.check_guards("partial")
    for name, tensor in {"d": d, "sums": sums, "bias": bias}.items():
        if tensor:
            tensor.check_unchanged(name)


def check_peg_bwd(host, case: Peg, device: str) -> None:
    """dp, dweight, dbias, dp_bias of one case against fp64, by fp64 sums over the padded grid."""
    rng = np.random.default_rng(0)
    compute, weight_dtype, wanted = "fp64" if case.dtype == "fp64" else "fp32", case.weight_dtype or case.dtype, case.wanted.split()
    (height, width), channels = case.grid, case.channels
    shape = (case.batch, height * width, channels)
    dy = Tensor(shape, case.dtype, case.layout, rng.standard_normal(shape))
    sums = Tensor(shape, compute, "contiguous", rng.standard_normal(shape)) if "dweight" in wanted else None
    p_bias = Tensor((channels,), case.dtype, "strided", rng.standard_normal(channels)) if case.p_bias else None
    weight = Tensor((channels, 1, 3, 3), weight_dtype, "contiguous", rng.standard_normal((channels, 1, 3, 3)))
    sizes = {"dp": shape, "dweight": weight.array.shape, "dbias": (channels,), "dp_bias": (channels,)}
    out = {name: Tensor(size, case.dtype if name == "dp" else weight_dtype) if name in wanted else None for name, size in sizes.items()}
    lines = 11 if "dweight" in wanted else 2 if {"dbias", "dp_bias"} & set(wanted) else 0
    blocks = host.projector_sum_blocks(case.batch * height, 1 if device == "cuda" else height)
    partial = Tensor((lines, blocks, channels), compute)
    host.projector_peg_bwd(device, dy.array, sums and sums.array, p_bias and p_bias.array, weight.array, height, width,
                           *(t and t.array for t in out.values()), partial.array)  # fmt: skip

    image = dy.values().reshape(case.batch, height, width, channels)
    around = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    dp, dweight = image.copy(), np.zeros((channels, 1, 3, 3))
    p = (sums.values() if sums else np.zeros(shape)) + (p_bias.values() if p_bias else 0)
    for i in range(3):
        for j in range(3):
            seen = around[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width]  # dy at (y + 1 - i, x + 1 - j), 0 outside
            dp += weight.values()[:, 0, i, j] * seen
            dweight[:, 0, i, j] = (seen * p.reshape(image.shape)).sum((0, 1, 2))
    expected = {"dp": dp.reshape(shape), "dweight": dweight, "dbias": image.sum((0, 1, 2)), "dp_bias": dp.sum((0, 1, 2))}
    for name, got in out.items():
        if got:
            check_close(got, expected[name], harness.GRADIENT[got.dtype], name)
    partial.check_guards("partial")
    for name, tensor in {"dy": dy, "sums": sums, "p_bias": p_bias, "weight": weight}.items():
        if tensor:
            tensor.check_unchanged(name)


def check_large_strides(host, device: str) -> None:
    """Weights, biases and the rows of features have strides of their own; theirs count elements in 64 bits."""
    rng = np.random.default_rng(0)
    channels, step = 3, 2**31 + 64
    far = harness.sparse_rows(channels, 9, step)
    far[...] = rng.standard_normal((channels, 9))
    weight = np.lib.stride_tricks.as_strided(far, (channels, 1, 3, 3), (far.strides[0], 18, 6, 2))
    p, y = rng.standard_normal((1, 4, channels)).astype(np.float32), np.full((1, 4, channels), np.nan, np.float32)
    host.projector_peg(device, p, weight, far[:, 0], 2, 2, y)
    expected = peg(p.astype(np.float64), weight.astype(np.float64), far[:, 0].astype(np.float64), (2, 2))
    assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)

    dy = far[:, :channels].reshape(1, 3, channels)  # tokens far apart
    dp, dbias = np.full((1, 3, channels), np.nan, np.float32), np.full(channels, np.nan, np.float32)
    tap = np.zeros((channels, 1, 3, 3), np.float32)
    tap[:, 0, 1, 1] = 1
    partial = np.empty((2, host.projector_sum_blocks(3, 1 if device == "cuda" else 3), channels), np.float32)
    host.projector_peg_bwd(device, dy, None, None, tap, 3, 1, dp, None, dbias, None, partial)
    assert np.array_equal(dp, 2 * dy.astype(np.float32)) and np.allclose(dbias, dy.astype(np.float64).sum((0, 1)), atol=1e-6)
    dz = np.full((3, 9), np.nan, np.float32)
    host.projector_gelu_bwd(device, far, None, None, [], dz, None, np.empty((0, 9), np.float32))
    assert np.array_equal(dz, far.astype(np.float32))
    if device == "cpu":
        return
    x, w, out = harness.sparse_rows(3, 8, step), harness.sparse_rows(4, 8, step), np.full((3, 4), np.nan, np.float16)
    x[...], w[...] = rng.standard_normal((3, 8)), rng.standard_normal((4, 8))
    host.projector_linear([x], w, None, out, False, False, 1, 1, None)
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.linalg.norm(out - expected) <= harness.OUTPUT["fp16"] * np.linalg.norm(expected)
