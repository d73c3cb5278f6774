"""Names of what was attacked and by whom, for those who know no term of the field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fedkl.defenses import Arm


def plain_names(arms: Mapping[str, Arm]) -> dict[str, str]:
    """A plain name for each arm, by its own name; the own one where several would be called the same.

    Args:
        arms: The arms by name.
    """
    plain = {name: _plain(arm) for name, arm in arms.items()}
    often = Counter(plain.values())
    return {name: name if often[text] > 1 else text for name, text in plain.items()}


def _plain(arm: Arm) -> str:
    text = arm.defense.plain or arm.defense.type
    return f"{text}, opened" if arm.open and arm.defense.guesses() else text
