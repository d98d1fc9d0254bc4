"""The models that a run holds: built when first asked for, shared by every case, dropped when memory is wanted."""

from __future__ import annotations

import gc
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.baselines.subject import Subject


class Pool:
    def __init__(self) -> None:
        self._held: dict[tuple[str, str, torch.dtype], Subject] = {}

    def get(self, name: str, device: str, dtype: torch.dtype) -> Subject:
        """The model of that name (benchmarks.baselines.costs.shape_of), random weights in `dtype` on `device`."""
        from benchmarks.baselines.subject import build

        key = (name, str(device), dtype)
        if key not in self._held:
            self._held[key] = build(name, device, dtype)
        return self._held[key]

    def keep(self, names: Collection[str]) -> None:
        """Drops every model that is not named."""
        dropped = [key for key in self._held if key[0] not in names]
        for key in dropped:
            del self._held[key]
        if dropped:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def held_bytes(self, device: str) -> int:
        return sum(subject.nbytes for (_, where, _), subject in self._held.items() if where == str(device))


POOL = Pool()
