"""Which trials are attacked together, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fedkl.attacking.observing import Trial
from fedkl.attacks import Attack


def lots_of(
    trials: Sequence[Trial], attack: Attack, *, chunk: int, workers: int, updates_per_client: int
) -> Iterator[Sequence[Trial]]:
    """The trials in lots that are attacked one after the other; an interrupted run has kept the lots before.

    Company makes attacks faster, and interruptions dearer: of 20 problems of DLG on LeNet, lots of 10 take
    1.2 times as long as all at once, lots of 5 take 1.7 times. So there are at least two lots, unless every
    worker has one trial only. Where lots end does not depend on what an earlier run did: in a run that goes
    on trials have the company that they would have had.

    Args:
        trials: All of a run.
        attack: Where one observation serves the others, all trials are one lot.
        chunk: Trials of a lot at most; rounded up to whole clients.
        workers: Threads that share a lot out.
        updates_per_client: So many trials in a row are one client's.
    """
    if not attack.divisible:
        yield trials
        return
    share = -(-len(trials) // workers)  # of a worker, if all trials were one lot
    size = min(chunk, workers * -(-share // 2))
    size = max(1, -(-size // updates_per_client)) * updates_per_client
    for first in range(0, len(trials), size):
        yield trials[first : first + size]


class Pace:
    """How many trials of a batch are done, in parts, from what an attack says of its evaluations.

    An estimate, for a display: a problem that stopped is done, and one that runs is as far as its attack's
    evaluations at most.

    Args:
        told: Called with (evaluations so far, problems still running, trials done).
        trials: Of the batch.
        most: See `Attack.most_evaluations`.
    """

    def __init__(self, told: Callable[[int, int, float], None], *, trials: int, most: int) -> None:
        self._told, self._trials, self._most = told, trials, most
        self._first = self._last = 0  # problems that ran
        self._falls = True  # their number: where it rises, it says nothing of what is done

    def __call__(self, evaluations: int, running: int) -> None:
        """Tells of a step."""
        self._first = self._first or running
        self._falls &= running <= (self._last or running)
        self._last = running
        stopped = 1 - running / self._first if self._falls and self._first else 0.0
        worked = min(1.0, evaluations / self._most) if self._most else 0.0
        self._told(evaluations, running, self._trials * max(stopped, worked))
