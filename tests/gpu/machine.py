"""What the tests of this folder ask of a device, twice: a CUDA GPU, and its rehearsal on a CPU.

The rehearsal proves that the bodies of the tests run and judge rightly on machines without a GPU; streams, graphs and clocks
are the few lines of `Cuda` that it cannot reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from tests.gpu.carry import moved


class Cuda:
    """The current CUDA device, and one backend on it."""

    device = "cuda"
    large = True  # sizes that users run

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def put(self, t: torch.Tensor) -> torch.Tensor:
        return moved(t, self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def streams(self, count: int) -> list[Callable[[], contextlib.AbstractContextManager]]:
        """Side streams; streams[i]() is a context in which stream i is current."""
        made = [torch.cuda.Stream() for _ in range(count)]
        return [lambda s=s: torch.cuda.stream(s) for s in made]

    def occupy(self) -> None:
        """Keeps the current stream busy for about 30 ms, so that what is queued behind it runs late."""
        torch.cuda._sleep(50_000_000)

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        """A host synchronisation through torch inside is an error."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capture(self, work: Callable[[], list[torch.Tensor]]) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """(replay, outputs) of a CUDA graph of `work`; Triton compiles and workspaces are made before the capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = work()
        return graph.replay, outputs

    def compile(self, f: Callable) -> Callable:
        return torch.compile(f, fullgraph=True, mode="reduce-overhead")

    def next_iteration(self) -> None:
        """Between calls of a compiled function: its outputs of the last call may be overwritten."""
        torch.compiler.cudagraph_mark_step_begin()


class Rehearsal(Cuda):
    """The same calls on the cpu backend, small."""

    device = "cpu"
    large = False

    def __init__(self) -> None:
        super().__init__("cpu")

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 40

    def streams(self, count: int) -> list[Callable[[], contextlib.AbstractContextManager]]:
        return [contextlib.nullcontext] * count

    def occupy(self) -> None:
        pass

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[], list[torch.Tensor]]) -> tuple[Callable[[], None], list[torch.Tensor]]:
        outputs = work()

        def replay() -> None:
            for kept, fresh in zip(outputs, work(), strict=True):
                kept.copy_(fresh)

        return replay, outputs

    def compile(self, f: Callable) -> Callable:
        return torch.compile(f, fullgraph=True, backend="aot_eager")
