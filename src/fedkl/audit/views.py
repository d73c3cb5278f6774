"""The arms of the comparison: what a client does × what the server knows and guesses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from fedkl.config import AttackConfig
from fedkl.defenses import AnyDefense, KeyLock, NoDefense, PrivateLayers, PrivateNorm
from fedkl.errors import ConfigError, shown
from fedkl.protocol import Knowledge

Regressed = Literal["nothing", "key", "affine"]

FilledIn = Literal["drawn", "neutral", "calibrated"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One column of the comparison.

    Attributes:
        name: Short name.
        description: What stands behind it, in one line.
        defense: What the client does.
        knowledge: What the server is granted.
        regress: What the attack finds together with the images, instead of relying on the server's guess:
            the key, or γ and β themselves.
        filled_in: What the server puts where it knows neither: what a key and lock layers of its own draw
            generate, γ = 1 and β = 0, or what fits its auxiliary images and labels best.
    """

    name: str
    description: str
    defense: AnyDefense
    knowledge: Knowledge = field(default_factory=Knowledge)
    regress: Regressed = "nothing"
    filled_in: FilledIn = "drawn"


def standard_arms(lock: KeyLock | None = None, *, labels: bool = True, auxiliary: int = 0) -> tuple[Arm, ...]:
    """The locked arm, its controls, every cell of the paper's threat-model grid, and better guesses.

    Args:
        lock: The lock; default options if None.
        labels: Whether the server is granted the true labels, in every arm.
        auxiliary: How many labeled images of its own it has, in every arm.

    The gradient of the lock layers gives the first lock's key away without any attack, as the ratio of the
    gradients of W and b; the arms that see it only match it too, with the key they have.

    Source:
        The grid: arXiv 2305.04095, section 3; its public implementation.
    """
    lock = lock or KeyLock()

    def arm(
        name: str,
        description: str,
        defense: AnyDefense = lock,
        *,
        regress: Regressed = "nothing",
        filled_in: FilledIn = "drawn",
        **granted: bool,
    ) -> Arm:
        return Arm(
            name=name,
            description=description,
            defense=defense,
            knowledge=Knowledge(labels=labels, auxiliary=auxiliary, **granted),
            regress=regress,
            filled_in=filled_in,
        )

    return (
        arm("no-norm", "plain network, no lock", NoDefense()),
        arm("public-norm", "the locked network, γ and β public", affine=True, affine_gradient=True),
        arm("private-norm", "γ and β private, no key (FedBN)", PrivateNorm(like=lock)),
        arm("lock", "key-lock, nothing private known"),
        arm("lock-known-key", "key-lock, key known", key=True),
        arm("lock-known-layers", "key-lock, lock layers known, wrong key", lock_layers=True),
        arm("lock-known-both", "key-lock, key and lock layers known", key=True, lock_layers=True),
        arm("lock-seen-gradient", "key-lock, gradient of the lock layers matched too", lock_gradient=True),
        arm(
            "lock-known-key-seen-gradient",
            "key-lock, key known, gradient of the lock layers matched too",
            key=True,
            lock_gradient=True,
        ),
        arm(
            "lock-regressed-key",
            "key-lock, lock layers known, the key found along with the image",
            regress="key",
            lock_layers=True,
        ),
        arm("lock-regressed-affine", "key-lock, γ and β found along with the image", regress="affine"),
        arm("lock-known-affine", "key-lock, γ and β known, not their gradient", affine=True),
        arm("lock-neutral", "key-lock, γ = 1 and β = 0 put in", filled_in="neutral"),
        arm("lock-calibrated", "key-lock, γ and β fitted to auxiliary images", filled_in="calibrated"),
        arm(
            "lock-shared-statistics",
            "key-lock, nothing private known but the norms' running statistics, which are sent",
            replace(lock, share_statistics=True),
        ),
        arm("private-head", "no lock, the classifier stays private", PrivateLayers(layers="head")),
        arm("private-stem", "no lock, the first layer stays private", PrivateLayers(layers="stem")),
    )


MAIN_ARMS = (
    "no-norm",
    "public-norm",
    "private-norm",
    "lock",
    "lock-known-key",
    "lock-known-layers",
    "lock-known-both",
)
"""What an attack runs if no arms are named: the lock and its controls."""


def chosen_arms(config: AttackConfig) -> tuple[Arm, ...]:
    """The arms that a configuration names; the lock and its controls if it names none.

    Raises:
        ConfigError: A name is unknown.
    """
    known = standard_arms(config.lock, labels=config.labels_known, auxiliary=config.auxiliary)
    arms = {arm.name: arm for arm in known}
    unknown = [name for name in config.arms if name not in arms]
    if unknown:
        named = ", ".join(map(shown, unknown[:10]))
        raise ConfigError(f"arms: unknown {named}. Choose from {', '.join(arms)}.")
    return tuple(arms[name] for name in config.arms or MAIN_ARMS)
