"""The rungs of the ladder, as settings of attacks; every defense is judged by the worst of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

CONTROL = "no-norm"
"""The arm on which a rung must succeed before it says anything about a private layer."""

LOCK_CONTROL = "public-norm"
"""The same for a lock: its network, inserted norms included, with public γ and β."""

FLOOR = "floor"
"""The rung that looks at the label only."""

CEILING = "lock-known-affine"
"""The arm that knows γ and β; it bounds the rungs of its attack and is none itself."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One attack, in the arms where it differs in what it guesses of γ and β.

    Attributes:
        name: Short name.
        attack: Settings by field.
        locked: Arms of the locked network, attacked for every choice of locked layers.
        unlocked: Arms that have no lock: the control, and other arrangements.
        images: Attacked in a cell by default.
        networks: One network for all images, as in a round, or one for each.
    """

    name: str
    attack: Mapping[str, Any]
    locked: tuple[str, ...] = (LOCK_CONTROL, "lock")
    unlocked: tuple[str, ...] = (CONTROL,)
    images: int = 20
    networks: Literal["each", "one"] = "each"


_OTHERS = ("private-head", "private-stem")

RUNGS: Mapping[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung(
            name=FLOOR,
            attack={"type": "prior-only"},
            locked=("lock",),
            unlocked=_OTHERS,
            images=100,
            networks="one",
        ),
        Rung(
            name="learned",
            attack={"type": "learned"},
            unlocked=(CONTROL, *_OTHERS),
            images=100,
            networks="one",
        ),
        Rung(name="closed-form", attack={"type": "closed-form"}, unlocked=(CONTROL, "private-head")),
        Rung(
            name="matching",
            attack={"type": "ig", "iterations": 500, "weighting": "sqrt"},
            locked=(
                LOCK_CONTROL,
                *("lock", "lock-neutral", "lock-calibrated", "lock-regressed-affine"),
                CEILING,
            ),
        ),
    )
}
"""By name: the floor, learned inversion, closed form, and gradient matching with each guess of γ and β."""
