"""The gradients of the projectors, on every backend: the forward again as far as a gradient needs it, the library's products, and
between them the backend's own passes.

`kernels` is the backend's module. It has
    product_dtype(features, weights)        the dtype that operands of products are in
    inputs(features, dtype)                 matrices (rows, v_k) side by side, or tensors (..., v_k) that `sums` reads where they lie
    sums(x, weight)                         [x_1, .., x_K] @ weight.T, (rows, out), compute dtype
    gelu(sums, bias, dtype, operand)        gelu(sums + bias) rounded to dtype, stored in `operand`
    gelu_pool(sums, bias, H, W, h, w, dtype, operand)   the same, pooled: (batch, h*w, out)
    times(a, b, dtype)                      a @ b, sums in the compute dtype, in dtype
and the passes of csrc/projector/projector.h: gelu_bwd, gelu_pool_bwd, peg_bwd, whose results are empty where their dtype is None.
"""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dtype_if(want: bool, tensor: torch.Tensor | None) -> torch.dtype | None:
    return tensor.dtype if want else None


def _weight_gradient(kernels, g: torch.Tensor, x: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """g.T @ [x_1, .., x_K], (out, in): each segment's columns where they belong."""
    x = [t.reshape(g.shape[0], t.shape[-1]) for t in x]
    if len(x) == 1:
        return kernels.times(g.t(), x[0], weight.dtype)
    dweight, column = weight.new_empty(weight.shape), 0
    for t in x:
        columns = dweight[:, column : column + t.shape[1]]
        if g.dtype == dweight.dtype:
            torch.mm(g.t(), t, out=columns)
        else:
            columns.copy_(kernels.times(g.t(), t, dweight.dtype))
        column += t.shape[1]
    return dweight


def _first_layer(kernels, g, x, features, weight, want_features, want_weight) -> tuple[list, torch.Tensor | None]:
    """Gradients of the features and of the first weight; g (rows, out_0) is that of the layer's output."""
    dfeatures, column = [], 0
    for feature, want in zip(features, want_features):
        part = weight[:, column : column + feature.shape[-1]]
        dfeatures.append(kernels.times(g, part, feature.dtype).reshape(feature.shape) if want else None)
        column += feature.shape[-1]
    return dfeatures, _weight_gradient(kernels, g, x, weight) if want_weight else None


@torch.no_grad()
def mlp_projector_bwd(kernels, dy, features, weights, biases, want_features, want_weights, want_biases) -> list:
    """One per feature, weight and bias; None where it is not wanted."""
    dtype, compute, n = features[0].dtype, compute_dtype(features[0].dtype), len(weights)
    operand = kernels.product_dtype(features, weights)
    dweights, dbiases = [None] * n, [None] * n
    # The lowest layer that some gradient reaches; the gradient of a layer's output enters products there and above.
    lowest = 0 if any(want_features) else next((i for i in range(n) if want_weights[i] or want_biases[i]), n)
    enters = [want_weights[i] or lowest < i or (i == 0 and any(want_features)) for i in range(n)]

    inputs: list = [kernels.inputs(features, operand)] + [None] * (n - 1)
    sums: list = [None] * n
    if lowest < n - 1 or want_weights[-1]:
        for i in range(n - 1):
            sums[i] = kernels.sums(inputs[i], weights[i])
            if not want_weights[i]:
                inputs[i] = None
            if i + 2 < n or want_weights[-1]:
                inputs[i + 1] = [kernels.gelu(sums[i], biases[i], dtype, operand)]
            if i < lowest:
                sums[i] = None

    # The last layer has no GELU: what arrives is its gradient, copied only if a product could not read it.
    g, rows = dy, dy.shape[:-1].numel()
    copy = enters[-1] and not (dy.dtype == operand and dy.is_contiguous())
    if copy or want_biases[-1]:
        g, dbiases[-1] = kernels.gelu_bwd(dy, None, None, operand if copy else None, _dtype_if(want_biases[-1], biases[-1]))
    if not copy and enters[-1]:
        g = dy.reshape(rows, dy.shape[-1])
    for i in range(n - 1, 0, -1):
        if want_weights[i]:
            dweights[i] = _weight_gradient(kernels, g, inputs[i], weights[i])
        inputs[i] = None
        if lowest == i:
            break
        d = kernels.times(g, weights[i], compute)
        g, dbiases[i - 1] = kernels.gelu_bwd(
            d, sums[i - 1], biases[i - 1], operand if enters[i - 1] else None, _dtype_if(want_biases[i - 1], biases[i - 1])
        )
        sums[i - 1] = None
    dfeatures = [None] * len(features)
    if enters[0]:
        dfeatures, dweights[0] = _first_layer(kernels, g, inputs[0], features, weights[0], want_features, want_weights[0])
    return [*dfeatures, *dweights, *(b if want else None for b, want in zip(dbiases, want_biases))]


@torch.no_grad()
def ldp_projector_bwd(
    kernels, dy, features, weights, biases, peg_weight, peg_bias, grid, out_grid, want_features, want_weights, want_biases, want_peg
) -> list:
    """One per feature, weight, bias, and the two of the encoding; None where it is not wanted."""
    dtype, compute, batch = features[0].dtype, compute_dtype(features[0].dtype), features[0].shape[0]
    operand = kernels.product_dtype(features, weights)
    hidden, out = weights[0].shape[0], weights[1].shape[0]
    tokens, out_tokens = grid[0] * grid[1], out_grid[0] * out_grid[1]
    first_enters = any(want_features) or want_weights[0]  # the gradient of the first layer's output enters a product
    first = first_enters or want_biases[0]

    inputs = kernels.inputs(features, operand)
    sums = pooled = p = None
    if first or want_weights[1] or want_peg[0]:
        sums = kernels.sums(inputs, weights[0]).view(batch, tokens, hidden)
    if want_weights[1] or want_peg[0]:
        pooled = kernels.gelu_pool(sums, biases[0], *grid, *out_grid, dtype, operand).view(batch * out_tokens, hidden)
    if want_peg[0]:
        p = kernels.sums([pooled], weights[1]).view(batch, out_tokens, out)

    dp, dpeg_weight, dpeg_bias, dbias_1 = kernels.peg_bwd(
        dy, p, biases[1] if want_peg[0] else None, peg_weight, *out_grid, operand if first or want_weights[1] else None,
        _dtype_if(want_peg[0], peg_weight), _dtype_if(want_peg[1], peg_bias), _dtype_if(want_biases[1], biases[1]),
    )  # fmt: skip
    dfeatures, dweights, dbias_0 = [None] * len(features), [None, None], None
    if first or want_weights[1]:
        dp = dp.view(batch * out_tokens, out)
    if want_weights[1]:
        dweights[1] = kernels.times(dp.t(), pooled, weights[1].dtype)
    if first:
        dpooled = kernels.times(dp, weights[1], compute).view(batch, out_tokens, hidden)
        g, dbias_0 = kernels.gelu_pool_bwd(
            dpooled, sums, biases[0], *grid, *out_grid, operand if first_enters else None, _dtype_if(want_biases[0], biases[0])
        )
        if first_enters:
            dfeatures, dweights[0] = _first_layer(kernels, g, inputs, features, weights[0], want_features, want_weights[0])
    gradients = [*dfeatures, *dweights, dbias_0, dbias_1, dpeg_weight, dpeg_bias]
    wanted = [*want_features, *want_weights, *want_biases, *want_peg]
    return [gradient if want else None for gradient, want in zip(gradients, wanted)]
