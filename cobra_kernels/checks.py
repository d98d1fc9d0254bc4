"""Argument checks shared by the ops. They cost one comparison when all is well; the message is built only when not."""

from __future__ import annotations

import torch

from .errors import DtypeError, ShapeError

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
INDICES = frozenset((torch.int32, torch.int64))


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


def requires_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record this call."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False
