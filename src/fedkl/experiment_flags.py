"""Experiments from the command line: a file or the defaults, and the fields that were given instead."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter

from fedkl.config import REMEDY, AttackConfig, TrainConfig, load, parse, validated, values_of
from fedkl.data import DATASETS, AnyPartition
from fedkl.defenses import LOCK_SETTINGS, KeyLock, PrivateNorm, PublicNorm
from fedkl.errors import ConfigError, shown
from fedkl.masking import Mode
from fedkl.parsing import parse_toml

_MAX_PARTS = 8  # of a --set place; the deepest field has four
_PARTITION: TypeAdapter[AnyPartition] = TypeAdapter(Annotated[AnyPartition, Field(discriminator="type")])


def from_flags(
    kind: Literal["train", "attack"],
    *,
    file: Path | None,
    fields: dict[str, Any],
    defense: str | None = None,
    attack: str | None = None,
    lock: str | None = None,
    layers: str | None = None,
    settings: Sequence[str] = (),
) -> TrainConfig | AttackConfig:
    """An experiment from the command line: a file or the defaults, with the fields that were given instead.

    Args:
        kind: What the file must hold.
        file: A TOML file; the defaults if None.
        fields: Values by dotted field; None: not given.
        defense: Type of the defense. Another type than before starts from its own defaults, but
            where both have a lock, the lock stays.
        attack: Type of the attack. Another type than before starts from its own defaults.
        lock: Setting of the lock, "default" or "published"; its other fields stay.
        layers: Locked layers.
        settings: Any field as ``training.local.proximal=0.01``: a dotted place and a TOML value.

    Raises:
        ConfigError: The file or a field is not usable, or a lock is described that the defense does not have.
    """
    values = values_of(parse({"type": kind}, source="Default") if file is None else load(file))
    if values["type"] != kind:
        raise ConfigError(f"{file}: expected a {kind} experiment, this is '{values['type']}'.")
    if attack is not None and attack != values.get("attack", {}).get("type"):
        values["attack"] = {"type": attack}
    folder = _folder_fields(fields.get("data.name"))
    for place, value in (fields | folder).items():
        if value is not None:
            _set(values, place, value)
    if defense is not None:
        values["defense"] = _switched(values["defense"], defense)
    for setting in settings:
        place, value = _parsed_setting(setting)
        if place == "data.root" and folder:
            raise ConfigError(
                f"--data {shown(fields['data.name'])} and --set data.root name two folders. Give one of them."
            )
        if kind == "attack" and place.startswith("lock."):  # its name before 0.2
            place = f"defense.{place.removeprefix('lock.')}"
        _set(values, place, value)
    experiment, described = _from_flags(values, kind), _lock_fields(lock, layers)
    if not described:
        return experiment
    values = values_of(experiment)
    target = _lock_of(values["defense"])
    if target is None:
        raise ConfigError(
            f"--lock, --layers: the defense '{values['defense']['type']}' has no lock. Leave them out, or "
            f"add --defense with one of {', '.join(_LOCKED)}."
        )
    target.update(described)
    return _from_flags(values, kind)


def _from_flags(values: dict[str, Any], kind: Literal["train", "attack"]) -> TrainConfig | AttackConfig:
    remedy = "Set a field as --set PLACE=VALUE, with the places of a run directory's config.toml."
    if kind == "attack":
        remedy += " Options of the attack are --set attack.NAME=VALUE: see `fedkl attack --list`."
    return parse(values, source="The command line", remedy=remedy)


_LOCKED = tuple(kind.type for kind in (KeyLock, PublicNorm, PrivateNorm))


def _folder_fields(data: str | None) -> dict[str, Any]:
    """A folder of images in place of a dataset's name: the dataset of such folders, and its root."""
    if data is None or data in DATASETS or not (os.sep in data or Path(data).is_dir()):
        return {}
    return {"data.name": "imagefolder", "data.root": data}


def _set(values: dict[str, Any], place: str, value: Any) -> None:
    *path, last = place.split(".")
    if len(path) >= _MAX_PARTS:
        raise ConfigError(
            f"{shown(place)}: expected at most {_MAX_PARTS} parts, got {len(path) + 1}. {REMEDY}"
        )
    for name in path:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{shown(place)}: {shown(name)} is a value, it has no fields. {REMEDY}")
    values[last] = value


def _parsed_setting(setting: str) -> tuple[str, Any]:
    place, equals, text = setting.partition("=")
    if not (place.strip() and equals):
        raise ConfigError(f"--set {shown(setting)}: expected PLACE=VALUE, e.g. training.local.proximal=0.01.")
    try:
        values = parse_toml(f"value = {text}")
    except ValueError:
        values = {}
    return place.strip(), values["value"] if len(values) == 1 else text  # a bare word is a text


def partition_of(text: str) -> AnyPartition:
    """The partition that a text names; see `partition_fields`.

    Raises:
        ConfigError: It names none.
    """
    partition: AnyPartition = validated(
        _PARTITION.validate_python,
        partition_fields(text),
        kind=AnyPartition,
        subject=f"--partition {shown(text)} is not usable.",
    )
    return partition


def aggregation_fields(masking: str) -> dict[str, Any]:
    """An aggregation from the command line: ``blind``, ``pairwise``, ``both`` or ``none``.

    Raises:
        ConfigError: It is none of them.
    """
    if masking == "none":
        return {"type": "plain"}
    if masking not in get_args(Mode):
        expected = ", ".join((*get_args(Mode), "none"))
        raise ConfigError(f"--masking {shown(masking)}: expected one of {expected}.")
    return {"type": "masked", "mode": masking}


def partition_fields(text: str) -> dict[str, Any]:
    """A partition from the command line: ``iid``, ``shards:2`` or ``dirichlet:0.1``.

    Raises:
        ConfigError: Another form.

    >>> partition_fields("dirichlet:0.1")
    {'type': 'dirichlet', 'alpha': 0.1}
    """
    kind, colon, number = text.partition(":")
    field = {"shards": ("per_client", int), "dirichlet": ("alpha", float)}.get(kind)
    try:
        if colon and kind == "iid":
            raise ValueError
        return {"type": kind} | ({field[0]: field[1](number)} if field and colon else {})
    except ValueError as error:
        expected = "iid, shards:<number per client> or dirichlet:<alpha>"
        raise ConfigError(f"--partition {shown(text)}: expected {expected}, e.g. dirichlet:0.5.") from error


def _lock_fields(lock: str | None, layers: str | None) -> dict[str, Any]:
    if lock is not None and lock not in LOCK_SETTINGS:
        raise ConfigError(f"--lock: unknown {shown(lock)}. Choose one of {', '.join(LOCK_SETTINGS)}.")
    fields: dict[str, Any] = {} if lock is None else dict(LOCK_SETTINGS[lock])
    return fields if layers is None else fields | {"layers": layers}


def _lock_of(defense: dict[str, Any]) -> dict[str, Any] | None:
    """The lock's fields in a defense: its own, or those of the lock that a control is like."""
    found = defense.get("like", defense)
    return found if isinstance(found, dict) and found.get("type") == KeyLock.type else None


def _switched(defense: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == defense["type"]:
        return defense
    lock = _lock_of(defense) or {"type": KeyLock.type}
    if kind == KeyLock.type:
        return lock
    return {"type": kind, "like": lock} if kind in _LOCKED else {"type": kind}
