"""What forks decorate their autograd functions with, on this machine's accelerator."""

from __future__ import annotations

from functools import partial

import torch

_device_type = "cuda" if torch.cuda.is_available() else "cpu"
custom_fwd = partial(torch.amp.custom_fwd, device_type=_device_type)
custom_bwd = partial(torch.amp.custom_bwd, device_type=_device_type)

__all__ = ["custom_bwd", "custom_fwd"]
