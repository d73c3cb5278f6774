"""The attackers of an audit, the cheapest strong ones first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedkl.attacks import ATTACKS, Attack
from fedkl.auditing.results import ThreatModel

PRESENCE = "presence"
"""The attacker that looks for given images in an update, see presence.py; it rebuilds none."""


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """One that rebuilds images.

    Attributes:
        name: Of findings.
        type: Of the attack.
        options: Of the attack.
        threat_model: What it takes to be it.
        own_images: Images of the server's own, at most; less where the subject has fewer.
        images: Attacked at most.
        replays: Whether it does on its own images what a client does; else an update is enough.
        once: Updates of such a client that it computes however many it attacks, about; for the plan.
        each: The same for each update that it attacks.
    """

    name: str
    type: str
    options: dict[str, Any] = field(default_factory=dict)
    threat_model: ThreatModel
    own_images: int = 0
    images: int = 100
    replays: bool = True
    once: int = 0
    each: int = 0

    def attack(self) -> Attack:
        """The attack, with its options."""
        return ATTACKS[self.type](**self.options)


ATTACKERS: tuple[Attacker, ...] = (
    Attacker(name="positions", type="positions", threat_model="B", replays=False, each=20),
    Attacker(
        name="feature-inversion",
        type="feature-inversion",
        threat_model="D",
        own_images=1000,
        images=20,
        once=1000,
    ),
    Attacker(
        name="linear-rows",
        type="linear-rows",
        threat_model="D",
        own_images=1000,
        replays=False,
        each=50,
    ),
    Attacker(
        name="disaggregation",
        type="disaggregation",
        threat_model="D",
        own_images=1000,
        images=48,
        replays=False,
        once=2500,
    ),
    Attacker(name="closed-form", type="closed-form", threat_model="B", images=20, each=500),
    Attacker(
        name="matching",
        type="ig",
        options={"iterations": 500},
        threat_model="C",
        images=20,
        each=1500,
    ),
    Attacker(name="learned", type="learned", threat_model="D", own_images=1000, once=2500),
    Attacker(
        name="gauss-newton",
        type="gauss-newton",
        threat_model="D",
        own_images=1000,
        images=10,
        each=8000,
    ),
)
"""In the order in which they are run, cheap and strong first; one that is not registered is left out."""


def available() -> tuple[Attacker, ...]:
    """Those whose attack is registered."""
    return tuple(each for each in ATTACKERS if each.type in ATTACKS.names())
