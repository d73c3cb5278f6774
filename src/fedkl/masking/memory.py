"""What a member must not forget between messages, written down before a reply leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from fedkl.errors import MaskingError


@dataclass
class RunMemory:
    """What a member remembers of one run. All digests and nonces as hexadecimal text.

    Attributes:
        round: The last round that it uploaded to; -1: none.
        attempt: The last attempt of that round.
        uploads: Nonces of the uploads of that round by context; several, with blanks between them, where it
            was asked again.
        revealed: Digests of the lists that it revealed for in that round, by context.
        names: Digest of the names that it revealed for in that round; empty: it has not.
        model: Digest of the model that it has accepted; empty: none yet.
        opened: The round of the last sum that it opened; -1: none.
        transcript: Digest of all sums so far.
    """

    round: int = -1
    attempt: int = -1
    uploads: dict[str, str] = field(default_factory=dict)
    revealed: dict[str, str] = field(default_factory=dict)
    names: str = ""
    model: str = ""
    opened: int = -1
    transcript: str = ""


def nowhere(memory: Memory) -> None:
    """Keeps nothing: for members that last as long as their process, or that a checkpoint keeps."""


@dataclass
class Memory:
    """What a member remembers of one roster.

    Attributes:
        runs: By the run's name.
        sets: For every model on which it revealed: a digest of the names, which may not change.
        keep: Writes it down; called before a reply leaves. Raises if it cannot.
    """

    runs: dict[str, RunMemory] = field(default_factory=dict)
    sets: dict[str, str] = field(default_factory=dict)
    keep: Callable[[Memory], None] = field(default=nowhere, repr=False, compare=False)

    def forget_unused(self) -> None:
        """Forgets runs without upload and sum: a model that was accepted may be accepted again."""
        for name in [name for name, run in self.runs.items() if run.round < 0 and run.opened < 0]:
            del self.runs[name]

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""
        return {"runs": {name: asdict(run) for name, run in self.runs.items()}, "sets": dict(self.sets)}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, keep: Callable[[Memory], None] = nowhere) -> Memory:
        """As it was written down.

        Args:
            values: What `to_json` gave.
            keep: See `Memory`.

        Raises:
            MaskingError: It is damaged.
        """
        try:
            runs = {str(name): _run(about) for name, about in values["runs"].items()}
            sets = {str(model): str(names) for model, names in values["sets"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise MaskingError("A member's memory is damaged. Restore it from a backup.") from error
        return cls(runs=runs, sets=sets, keep=keep)


def _run(about: dict[str, Any]) -> RunMemory:
    run = RunMemory(**about)
    integers = all(type(number) is int for number in (run.round, run.attempt, run.opened))
    texts = [run.names, run.model, run.transcript, *run.uploads.items(), *run.revealed.items()]
    flat = [text for item in texts for text in (item if isinstance(item, tuple) else (item,))]
    if not integers or not all(isinstance(text, str) for text in flat):
        raise TypeError
    return run
