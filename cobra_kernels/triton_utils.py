"""What every Triton launcher needs: rows of strided tensors, the device to launch on, and compiling without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch


def merge_rows(*tensors: torch.Tensor | None) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Leading dims of equally shaped (..., dim) tensors as few as their strides allow, at least one.

    Returns the sizes, outermost first, and for each tensor its strides in elements (zeros for None), so that a kernel
    reads any view in place. A plain tensor has one leading dim.
    """
    shape = next(t for t in tensors if t is not None).shape[:-1]
    strides = [(0,) * len(shape) if t is None else t.stride()[:-1] for t in tensors]
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in tensors]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(kept[-1] == size * stride[axis] for kept, stride in zip(merged, strides)):
            sizes[-1] *= size
            for kept, stride in zip(merged, strides):
                kept[-1] = stride[axis]
        else:
            sizes.append(size)
            for kept, stride in zip(merged, strides):
                kept.append(stride[axis])
    if not sizes:
        return (1,), [(0,) for _ in tensors]
    return tuple(sizes), [tuple(kept) for kept in merged]


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU current for a launch; nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def cross_compile(kernel: Callable, arguments: Sequence[tuple[str, object]], capability: int, num_warps: int, divisible: Sequence[str] = ()):
    """Compiles a @triton.jit kernel for a GPU that need not be there and returns triton's compiled kernel.

    arguments: name -> a Triton type such as "*bf16", "i64" or "constexpr" values given as ("constexpr", value).
    divisible: names of pointers and integers that are multiples of 16, as a launch finds most of them to be.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, object] = {}
    constants: dict[tuple[int, ...], object] = {}
    for position, (name, kind) in enumerate(arguments):
        if isinstance(kind, tuple) and kind[:1] == ("constexpr",):
            signature[name] = "constexpr"
            constants[position,] = kind[1]
        else:
            signature[name] = kind
    attributes = {(position,): [["tt.divisibility", 16]] for position, (name, _) in enumerate(arguments) if name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, "enable_fp_fusion": True})
