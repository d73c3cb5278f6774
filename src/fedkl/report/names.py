"""Names of what was attacked and by whom, for those who know no term of the field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fedkl.defenses import Arm, NoDefense
from fedkl.defenses.masked import MaskedUpload
from fedkl.report.collect import TrainRun


def plain_names(arms: Mapping[str, Arm]) -> dict[str, str]:
    """A plain name for each arm, by its own name; the own one where several would be called the same.

    Args:
        arms: The arms by name.
    """
    return _told_apart({name: _plain(arm) for name, arm in arms.items()})


def plain_trainings(trains: Sequence[TrainRun]) -> dict[str, str]:
    """The same for trainings, by what protects their clients."""
    return _told_apart({run.name: _protection(run) for run in trains})


def _told_apart(plain: Mapping[str, str]) -> dict[str, str]:
    often = Counter(plain.values())
    return {name: name if often[text] > 1 else text for name, text in plain.items()}


def _protection(run: TrainRun) -> str:
    defense = run.config.defense
    masks = [MaskedUpload.plain] if run.config.training.aggregation.describe() else []
    if masks and defense == NoDefense():
        return masks[0]
    return " and ".join([defense.plain or defense.type, *masks])


def _plain(arm: Arm) -> str:
    text = arm.defense.plain or arm.defense.type
    return f"{text}, opened" if arm.open and arm.defense.guesses() else text
