"""Argument checks shared by the ops. They cost one comparison when all is well; the message is built only when not."""

from __future__ import annotations

import contextlib
import os

import torch

from .errors import ArgumentError, DtypeError, ShapeError

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
INDICES = frozenset((torch.int32, torch.int64))
CHECK_CUDA_INDICES = os.environ.get("COBRA_KERNELS_CHECK") == "1"  # it makes the host wait for the GPU


def name_of(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def shape_error(op: str, name: str, tensor: torch.Tensor, why: str = "", **letters: int | str) -> ShapeError:
    """`op: name has shape (..), expected (letter=size, ..); why`. A letter given as text stands for itself."""
    expected = ", ".join(size if isinstance(size, str) else f"{letter}={size}" for letter, size in letters.items())
    text = f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({expected})"
    return ShapeError(f"{text}; {why}" if why else text)


def check_first(op: str, name: str, tensor: torch.Tensor) -> None:
    """The first tensor of an op decides dtype and device of the call: it must be a float tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise DtypeError(f"{op}: {name} is {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise DtypeError(f"{op}: {name} has dtype {name_of(tensor.dtype)}, expected float32, bfloat16, float16 or float64")
    if tensor.layout is not torch.strided:
        raise _layout_error(op, name, tensor)


def _layout_error(op: str, name: str, tensor: torch.Tensor) -> DtypeError:
    return DtypeError(f"{op}: {name} has layout {name_of(tensor.layout)}, expected a dense (strided) tensor")


def check_given(op: str, **tensors: torch.Tensor | None) -> None:
    """Tensors that have no default must not be None."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise DtypeError(f"{op}: {name} is None, expected a torch.Tensor")


def check_floats(op: str, first_name: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Every other float tensor: any mix of fp32, bf16 and fp16, or all fp64; on the device of the first."""
    for name, tensor in others.items():
        if tensor is not None:
            check_float(op, first_name, first, name, tensor)


def check_float(op: str, first_name: str, first: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    """One tensor of check_floats."""
    if not isinstance(tensor, torch.Tensor):
        raise DtypeError(f"{op}: {name} is {type(tensor).__name__}, expected a torch.Tensor or None")
    dtype = tensor.dtype
    if dtype != first.dtype:
        if dtype not in FLOATS:
            raise DtypeError(f"{op}: {name} has dtype {name_of(dtype)}, expected float32, bfloat16, float16 or float64")
        if dtype == torch.float64 or first.dtype == torch.float64:
            raise DtypeError(
                f"{op}: {name} has dtype {name_of(dtype)}, {first_name} has {name_of(first.dtype)}; "
                f"float64 does not mix with other dtypes: convert one of them"
            )
    if tensor.layout is not torch.strided:
        raise _layout_error(op, name, tensor)
    if tensor.device != first.device:
        raise DtypeError(f"{op}: {name} is on {tensor.device}, expected {first.device}; the device comes from {first_name}")


def check_index(op: str, name: str, tensor: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """An index tensor: int32 or int64, on the device of the first argument."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in INDICES:
        got = name_of(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise DtypeError(f"{op}: {name} has dtype {got}, expected int32 or int64")
    if tensor.device != first.device:
        raise DtypeError(f"{op}: {name} is on {tensor.device}, expected {first.device}; the device comes from {first_name}")


def reads_values(tensor: torch.Tensor) -> bool:
    """Whether the values of an index tensor are checked: on a CPU, and on a GPU with COBRA_KERNELS_CHECK=1; not while a compiler traces."""
    return not torch.compiler.is_compiling() and (tensor.is_cpu or CHECK_CUDA_INDICES)


def check_cu_seqlens(op: str, cu_seqlens: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    """The boundaries (num_seqs + 1,) of packed sequences: from 0, never decreasing, inside the one row of `first` (1, .., seqlen)."""
    check_index(op, "cu_seqlens", cu_seqlens, first_name, first)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise shape_error(op, "cu_seqlens", cu_seqlens, num_seqs="num_seqs + 1")
    batch, seqlen = first.shape[0], first.shape[-1]
    if batch != 1:
        raise ShapeError(f"{op}: {first_name} has batch={batch}, expected 1 with cu_seqlens: packed sequences lie end to end in one row")
    if not reads_values(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ArgumentError(f"{op}: cu_seqlens[0] is {bounds[0]}, expected 0")
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if end < begin:
            raise ArgumentError(f"{op}: cu_seqlens[{i + 1}] is {end}, expected at least cu_seqlens[{i}]={begin}")
    if bounds[-1] > seqlen:
        raise ArgumentError(f"{op}: cu_seqlens[-1] is {bounds[-1]}, expected at most seqlen={seqlen}; seqlen comes from {first_name}")


def autocast_dtype(first: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the device of `first`, where it is on. It leaves fp64 alone."""
    if not isinstance(first, torch.Tensor) or first.dtype == torch.float64:
        return None
    device = first.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Operands of products were cast by hand where autocast asked for it: nothing inside is cast again."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def requires_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record this call."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False
