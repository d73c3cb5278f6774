"""The rungs of the ladder, as settings of attacks; every defense is judged by the worst of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedkl.attacking.arrangements import CONTROL, LOCK_CONTROL

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
        locked: Arms of a locked network.
        unlocked: Arms that have no lock: the control, and those arrangements that it can be tried on.
        images: Attacked in a cell by default.
        networks: One network for all images, as in a round, or one for each.
        updates_per_client: Updates of one client that it combines.
        against: Locks that it is made for; None: any.
    """

    name: str
    attack: Mapping[str, Any]
    locked: tuple[str, ...] = (LOCK_CONTROL, "lock")
    unlocked: tuple[str, ...] = (CONTROL,)
    images: int = 20
    networks: Literal["each", "one"] = "each"
    updates_per_client: int = 1
    against: tuple[str, ...] | None = None


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
        Rung(
            name="learned-per-label",
            attack={"type": "learned", "per_label": True},
            unlocked=(CONTROL, *_OTHERS),
            images=100,
            networks="one",
        ),
        Rung(
            name="learned-16",
            attack={"type": "learned"},
            unlocked=(CONTROL, *_OTHERS),
            images=100,
            networks="one",
            updates_per_client=16,
        ),
        Rung(
            name="closed-form",
            attack={"type": "closed-form"},
            unlocked=(CONTROL, "private-head"),
            against=("first", "all", "first-default", "all-default", "classifier"),
        ),
        Rung(
            name="wiener",
            attack={"type": "wiener"},
            unlocked=(),
            networks="one",
            against=("element", "signed", "sandwich"),
        ),
        Rung(
            name="mean-map",
            attack={"type": "mean-map"},
            unlocked=("private-stem",),
            networks="one",
            against=(),
        ),
        Rung(
            name="feature-inversion",
            attack={"type": "feature-inversion"},
            unlocked=(CONTROL, *_OTHERS),
            networks="one",
        ),
        Rung(
            name="gauss-newton",
            attack={"type": "gauss-newton"},
            unlocked=(CONTROL, "private-stem"),
            networks="one",
            against=("first", "all", "first-default", "all-default", "classifier"),
        ),
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
"""By name: the floor, learned inversion (of one update, with simulations for its label, of 16 updates of a
client), closed form, those for locks per element and for private stems, the inversion of read features,
nonlinear least squares, and gradient matching with each guess of γ and β."""
