"""The arms of a comparison, as a configuration names them: what a client does × what the server knows."""

from __future__ import annotations

from fedkl.config import AttackConfig
from fedkl.defenses import Arm, arms_of, own_arms
from fedkl.errors import ConfigError, shown


def chosen_arms(config: AttackConfig) -> tuple[Arm, ...]:
    """The arms that a configuration names; the defense and its controls if it names none.

    Raises:
        ConfigError: A name is unknown.
    """
    arms = arms_of(config.defense, labels=config.labels_known, auxiliary=config.auxiliary)
    unknown = [name for name in config.arms if name not in arms]
    if unknown:
        named = ", ".join(map(shown, unknown[:10]))
        raise ConfigError(f"arms: unknown {named}. Choose from {', '.join(arms)}.")
    main = [arm.name for arm in own_arms(config.defense).values() if arm.main]
    return tuple(arms[name] for name in config.arms or main)
