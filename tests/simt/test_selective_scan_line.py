"""The line schedule of selective_scan (csrc/selective_scan/scan_line.h): its shares, and every interleaving of its hand-over.

The model runs the very item lists of the C++ code, one atomic action at a time: ticket, state stored, flag raised, flag seen,
flag cleared, counters cleared. The kernel itself runs in the emulator (room_selective_scan.py: SCHEDULES, order, resident).
"""

from __future__ import annotations

import pytest

SIZES = [(1, 1, 1), (1, 9, 1), (2, 5, 2), (3, 5, 2), (5, 4, 3), (5, 7, 4), (7, 3, 7), (8, 6, 5), (640, 100, 528), (640, 256, 528), (1000, 1, 999)]


@pytest.mark.parametrize("chains, steps, workers", SIZES)
def test_shares_are_equal_and_complete(host, chains, steps, workers):
    items = [host.selective_scan_line_items(chains, steps, workers, w) for w in range(workers)]
    shares = [sum(end - begin for _, begin, end, _, _ in mine) for mine in items]
    assert sum(shares) == chains * steps and max(shares) - min(shares) <= 1
    covered: dict[int, int] = {}
    for _, chain, begin, end in sorted((begin, chain, begin, end) for mine in items for chain, begin, end, _, _ in mine):
        assert begin == covered.get(chain, 0) and begin < end <= steps, "a step is missing or taken twice"
        covered[chain] = end
    assert all(covered[chain] == steps for chain in range(chains))
    for w, mine in enumerate(items):
        for i, (chain, begin, end, receives, sends) in enumerate(mine):
            assert receives == (begin > 0) and sends == (end < steps)
            assert not sends or i == 0, "a part that another worker waits for comes first"
            assert not receives or i == len(mine) - 1, "a part that waits comes last"
            if receives:
                assert items[w - 1][0][0] == chain and items[w - 1][0][2] == begin, "the state comes from the worker before"
                assert shares[w] - (steps - begin) >= begin - 1, "it would wait although all workers started together"


def test_shares_do_not_overflow(host):
    chains, steps, workers = 2**33, 2**27, 2**14 + 3
    last = host.selective_scan_line_items(chains, steps, workers, 0)[0]
    assert last[0] == (total := chains * steps) // workers // steps and last[2] == total // workers % steps


@pytest.mark.parametrize(
    "batch, dim, seqlen, workers",
    [
        (1, 5120, 800, 528),  # 640 chains: 1.2 per scheduler
        (1, 5120, 255, 0),  # too short
        (1, 4224, 800, 0),  # 528 chains: one each
        (1, 1536, 800, 0),
        (1, 6400, 800, 0),  # 1.5 per scheduler: the second warp of half of them costs less
        (2, 5120, 800, 1056),  # 2.4
        (1, 12160, 800, 0),  # 2.9
        (1, 8704, 800, 1056),  # 2.06
        (4, 5120, 800, 1584),  # 4.8: more than fit
        (8, 5120, 800, 0),  # a lane per channel
        (1, 0, 800, 0),
        (0, 5120, 800, 0),
    ],
)
def test_when_the_line_is_used(host, batch, dim, seqlen, workers):
    assert host.selective_scan_line_workers(batch, dim, seqlen, 132) == workers


class Model:
    """All interleavings of `launches` launches of `tickets` warps, of which `resident` run at once and `workers` have work. What a worker
    does is a list of (action, argument); a state of the model is a tuple of small numbers."""

    def __init__(self, host, chains, steps, workers, tickets, resident, launches=2, clear=True, by_index=False):
        self.steps, self.workers, self.tickets, self.resident, self.launches = steps, workers, tickets, resident, launches
        self.by_index, self.programs = by_index, []
        for worker in range(tickets):
            program = []
            items = host.selective_scan_line_items(chains, steps, workers, worker) if worker < workers else []
            for chain, begin, end, receives, sends in items:
                if receives:
                    program += [("see", worker - 1), *([("clear", worker - 1)] if clear else [])]
                program += [("run", (chain, begin, end))]
                if sends:
                    program += [("raise", worker)]
            self.programs.append((*program, ("leave", None)))
        self.start = (0, 0, (0,) * workers, (0,) * chains, 0, ((-1, 0),) * tickets)

    def successors(self, state):
        """(ticket, finished, flags, progress of each chain, launch, (program, position) of each worker); a worker starts at (-1, 0)."""
        ticket, finished, flags, progress, launch, threads = state
        running = sum(0 <= program and position < len(self.programs[program]) for program, position in threads)
        for i, (program, position) in enumerate(threads):

            def moved(to, ticket=ticket, finished=finished, flags=flags, progress=progress, i=i):
                return ticket, finished, flags, progress, launch, (*threads[:i], to, *threads[i + 1 :])

            if program < 0:
                if running < self.resident:
                    mine = i if self.by_index else ticket
                    assert mine < self.tickets, "a ticket too many: the counter was not cleared"
                    yield moved((mine, 0), ticket=ticket + 1)
                continue
            if position == len(self.programs[program]):
                continue
            (kind, what), after = self.programs[program][position], (program, position + 1)
            if kind == "see" and flags[what]:
                yield moved(after)
            elif kind == "clear":
                yield moved(after, flags=(*flags[:what], 0, *flags[what + 1 :]))
            elif kind == "run":
                chain, begin, end = what
                assert progress[chain] == begin, f"chain {chain} starts at {begin}, its state is that of {progress[chain]}"
                yield moved(after, progress=(*progress[:chain], end, *progress[chain + 1 :]))
            elif kind == "raise":
                assert not flags[what], "a flag is raised twice"
                yield moved(after, flags=(*flags[:what], 1, *flags[what + 1 :]))
            elif kind == "leave":
                last = finished + 1 == self.tickets
                yield moved(after, ticket=0 if last else ticket, finished=0 if last else finished + 1)

    def explore(self) -> int:
        """Visits every state; raises at a broken rule or a deadlock. Returns how many there are."""
        seen, todo = {self.start}, [self.start]
        while todo:
            state = todo.pop()
            following = list(self.successors(state))
            ticket, finished, flags, progress, launch, threads = state
            if not following:
                done = all(program >= 0 and position == len(self.programs[program]) for program, position in threads)
                assert done, "deadlock"
                assert set(progress) <= {self.steps} and not any(flags) and ticket == finished == 0, "the workspace is not as it was found"
                if launch + 1 < self.launches:
                    following = [(ticket, finished, flags, (0,) * len(progress), launch + 1, ((-1, 0),) * self.tickets)]
            todo += [s for s in following if s not in seen]
            seen.update(following)
        return len(seen)


CHAINS = [(3, 2, 2, 2), (4, 3, 3, 4), (5, 4, 3, 3), (5, 4, 4, 4)]  # chains, steps, workers, tickets


@pytest.mark.parametrize("chains, steps, workers, tickets", CHAINS)
@pytest.mark.parametrize("resident", [1, 2, 4])
def test_every_interleaving_ends_right(host, chains, steps, workers, tickets, resident):
    """Two launches over one workspace, any number of workers resident, tickets in any order of starting."""
    assert Model(host, chains, steps, workers, tickets, resident).explore() > workers


def test_the_model_sees_what_it_should(host):
    """Each rule of the hand-over, broken: the model says so."""
    sizes = dict(chains=4, steps=3, workers=3, tickets=3)
    with pytest.raises(AssertionError, match="workspace is not as it was found"):
        Model(host, **sizes, resident=3, clear=False).explore()
    with pytest.raises(AssertionError, match="deadlock"):  # blocks numbered by index start in any order
        Model(host, **sizes, resident=1, by_index=True).explore()
    early = Model(host, **sizes, resident=3)
    early.programs = [tuple(sorted(p, key=lambda action: action[0] != "raise")) for p in early.programs]  # flag before state
    with pytest.raises(AssertionError, match="its state is that of"):
        early.explore()
