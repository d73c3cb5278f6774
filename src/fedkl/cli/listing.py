"""What `fedkl attack --list` prints: what can be named, as the library has it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from fedkl.cli.terminal import console


def print_attacks() -> None:
    """Prints every attack with what it does and its options, then every arm and every defense."""
    from fedkl.attacks import ATTACKS
    from fedkl.defenses import DEFENSES, KeyLock, arms_of

    console.print(
        "Attacks (--attack), and what --set attack.NAME=VALUE sets, with the defaults:\n", highlight=False
    )
    for attack in ATTACKS:
        _print(attack.type, (attack.__doc__ or "").splitlines()[0], _options(attack))
    console.print("Arms (--arms):\n", highlight=False)
    for arm in arms_of(KeyLock()).values():
        _print(arm.name, arm.description)
    console.print(
        "Defenses (--defense), and what --set defense.NAME=VALUE sets, with the defaults:\n", highlight=False
    )
    for defense in DEFENSES:
        _print(defense.type, (defense.__doc__ or "").splitlines()[0], _options(defense))


def _print(name: str, *lines: str) -> None:
    about = [Padding(Text(line), (0, 0, 0, 4)) for line in lines if line]
    console.print(Group(Text(name, style="bold"), *about))


def _options(attack: Any) -> str:
    """The fields of an attack, each with its default as TOML would have it."""
    options = []
    for field in fields(attack):
        if field.name == "type":
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        options.append(f"{field.name}={_toml(default)}")
    return ", ".join(options)


def _toml(value: Any) -> str:
    if value is None or value is MISSING:
        return "(not set)"
    return str(value).lower() if isinstance(value, bool) else str(value)
