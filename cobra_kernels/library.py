"""The torch.library side of every op: schemas, fakes and autograd live in Python, so they exist without the extension.

C++ adds only implementations (STABLE_TORCH_LIBRARY_IMPL in csrc/<op>/<op>_binding.cpp).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("cobra_kernels", "DEF")
OPS = torch.ops.cobra_kernels


def define(schema: str, fake: Callable) -> None:
    """Defines `name(args) -> results` and its fake, which gives shapes and dtypes without computing."""
    LIBRARY.define(schema)
    torch.library.register_fake(f"cobra_kernels::{schema.split('(')[0]}", fake, lib=LIBRARY)


def implement(name: str, function: Callable, key: str) -> None:
    """A Python implementation of an op for one dispatch key."""
    LIBRARY.impl(name, function, key)


def differentiable(name: str, function: Callable, *, setup_context: Callable, backward: Callable) -> None:
    """The differentiable form of an op: `function` computes it from other ops, `backward` is its formula."""
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_autograd(f"cobra_kernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def first_order_only(name: str) -> None:
    """Makes a backward op refuse to be differentiated again, by name."""

    def backward(ctx, *grads):
        raise RuntimeError(f"cobra_kernels.{name}: double backward is not supported (gradients are first-order only)")

    torch.library.register_autograd(f"cobra_kernels::{name}", backward, lib=LIBRARY)
