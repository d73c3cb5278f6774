"""What a server does next with an attempt: it asks for reveals only where they open the sum.

A member that has revealed on a model reveals on it for the same names only. Reveals for a sum that cannot be
opened, or for other names than before, would thus cost all rounds that follow on that model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from fedkl.errors import MaskingError, gathered
from fedkl.masking.server import MaskedSum

_KEPT = 16


def nowhere(sets: RevealSets) -> None:
    """Keeps nothing: for trainings that end with their process, or that a checkpoint keeps."""


class RevealSets:
    """For which names members were asked to reveal, by the model that they had trained on; the last 16.

    Args:
        keep: Writes it down; called before anybody is asked. Raises if it cannot.
    """

    def __init__(self, *, keep: Callable[[RevealSets], None] = nowhere) -> None:
        self._keep = keep
        self._sets: list[tuple[bytes, tuple[str, ...]]] = []

    def on(self, model: bytes) -> list[tuple[str, ...]]:
        """The sets of names on a model.

        Args:
            model: Its digest.
        """
        return [names for digest, names in self._sets if digest == model]

    def add(self, model: bytes, names: Iterable[str]) -> None:
        """Notes whom members are going to be asked to reveal for; to be called before they are.

        Args:
            model: Its digest.
            names: Who is listed.
        """
        entry = model, tuple(names)
        if entry not in self._sets:
            self._sets = [*self._sets, entry][-_KEPT:]
            self._keep(self)

    def to_json(self) -> list[Any]:
        """As it is written down."""
        return [{"model": model.hex(), "names": list(names)} for model, names in self._sets]

    @classmethod
    def from_json(cls, values: Any, *, keep: Callable[[RevealSets], None] = nowhere) -> RevealSets:
        """As it was written down.

        Args:
            values: What `to_json` gave.
            keep: See `RevealSets`.

        Raises:
            ValueError: It is damaged.
        """
        found = cls(keep=keep)
        try:
            found._sets = [(bytes.fromhex(each["model"]), tuple(each["names"])) for each in values]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("no sets of names") from error
        if not all(isinstance(name, str) for _, names in found._sets for name in names):
            raise ValueError("no sets of names")
        return found


def further_attempt(attempt: MaskedSum, *, here: Collection[str], sets: RevealSets) -> tuple[str, ...] | None:
    """Who is to mask the updates once more, in a cohort of their own.

    Each further attempt is of fewer members, so that there is an end to them.

    Where uploads are too few for this cohort, they may be enough for one of those who sent them.

    Args:
        attempt: All uploads are in.
        here: Who will answer, as far as it is known.
        sets: For which names members were asked to reveal before.

    Returns:
        Names, sorted; None: reveals of those who are here open this attempt.

    Raises:
        MaskingError: Neither would open a sum. Nobody is to be asked to reveal.
    """
    enough = len(attempt.offered) >= attempt.needed
    listed = tuple(attempt.listed) if enough else attempt.offered
    before = sets.on(attempt.model)
    asked = {name for names in before for name in names}
    problems = attempt.missing_if(here) if enough else [f"{attempt.needed} uploads, got {len(listed)}"]
    if not problems and (listed in before or asked.isdisjoint(listed)):
        return None
    left = [name for name in listed if name in here]
    again = _same(before, left) if before else left
    if not again and before:  # members of whom a sum of this cohort could be made without the others
        rest = [name for name in left if name not in asked]
        again = rest if len(rest) >= attempt.needed else []
    if len(again) >= attempt.minimum:
        return tuple(again)
    raise MaskingError(_lost(attempt, problems, before, left))


def _same(before: Sequence[tuple[str, ...]], left: Sequence[str]) -> list[str]:
    """The largest set of names all of whom are here."""
    whole = [list(names) for names in before if set(names) <= set(left)]
    return max(whole, key=len, default=[])


def _lost(
    attempt: MaskedSum, problems: Sequence[str], before: Sequence[tuple[str, ...]], left: Sequence[str]
) -> str:
    summary = f"Round {attempt.call.round}: cannot be opened, and nobody was asked to reveal."
    if not before:
        return gathered(summary, problems, "The next round goes on with whoever is there.")
    absent = {names: ", ".join(name for name in names if name not in left) for names in before}
    return gathered(
        summary,
        [f"asked before, on this model: {len(names)}; not here: {gone}" for names, gone in absent.items()],
        "Members reveal on one model for the same members only. It goes on once all of them are there.",
    )
