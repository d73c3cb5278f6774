"""Which arms are attacked beside a defense."""

from __future__ import annotations

from dataclasses import replace

from fedkl.defenses.base import DEFENSES, Arm, Defense, plain_arm


def own_arms(defense: Defense) -> dict[str, Arm]:
    """The plain network, the defense's control, and what a server that knows the defense would try."""
    return {arm.name: arm for arm in (plain_arm(), defense.control(), *defense.guesses())}


def arms_of(defense: Defense, *, labels: bool = True, auxiliary: int = 0) -> dict[str, Arm]:
    """Every arm that can be attacked beside a defense, by name.

    Its own come first, then those of all other registered defenses with their usual options.

    Args:
        defense: The one whose options count.
        labels: Whether the server is granted the true labels, in every arm.
        auxiliary: How many labeled images of its own it has, in every arm.
    """
    arms = own_arms(defense)
    for kind in DEFENSES:
        for other in kind.variants():
            theirs = own_arms(other)
            for name, arm in theirs.items():
                if name in arms:
                    continue
                # A control of the same name may be that of another network: then there is none.
                control = arm.control and (theirs | arms)[arm.control]
                same = control is not None and control == theirs.get(arm.control or "")
                arms[name] = arm if same or arm.control is None else replace(arm, control=None)
    return {
        name: replace(arm, knowledge=replace(arm.knowledge, labels=labels, auxiliary=auxiliary))
        for name, arm in arms.items()
    }
