"""Experiments as data: what a run directory's config.toml holds, complete enough to repeat the run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedkl.attacks import ATTACKS, DLG, IDLG, Attack
from fedkl.data import AUGMENTATIONS, DATASETS, AnyPartition
from fedkl.defenses import DEFENSES, LOCK_SETTINGS, Defense, KeyLock, NoDefense, PrivateNorm, PublicNorm
from fedkl.errors import ConfigError, gathered, printable, shown
from fedkl.federated import Execution, FederatedTraining
from fedkl.files import read_file
from fedkl.masking import Mode
from fedkl.parsing import parse_toml
from fedkl.protocol import Procedure
from fedkl.validation import problems_of

_MAX_LINES = 60  # of a message
_MAX_BYTES = 2**18  # of a file; a complete experiment takes two thousand
_MAX_PLACE = 301  # characters of a place, whatever came
_MAX_PARTS = 8  # of a --set place; the deepest field has four


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_max_length=4096)


class DataConfig(_Config):
    """Which dataset, where its files are (None: `fedkl.data.default_root()`), and the images' size.

    A size of None is the dataset's usual one: 32, or 224 for folders of images. `channels` are 3 where they
    are None. `dicom` is what is black and white in DICOM files of a folder: "window" (None), "stored", or a
    window's center and width. `train_images` and `test_images` keep only the first so many of the training
    and of the test images.
    """

    name: str = "mnist-sample"
    root: str | None = None
    size: Annotated[int, Field(ge=1, le=4096)] | None = None
    channels: Annotated[int, Field(ge=1, le=16)] | None = None
    dicom: Literal["window", "stored"] | tuple[float, Annotated[float, Field(ge=1)]] | None = None
    train_images: Annotated[int, Field(ge=1)] | None = None
    test_images: Annotated[int, Field(ge=1)] | None = None


class ModelConfig(_Config):
    """Which model of the zoo, how its weights start, and whether it standardizes its input by channel.

    `weights` are trained ones instead: the run directory of a finished training, or a safetensors file with
    every tensor of the plain network. All trials have the same network then.
    """

    name: str = "lenet"
    initialization: Literal["default", "uniform"] = "uniform"
    standardize: bool = False
    weights: str | None = None


class CheckpointConfig(_Config):
    """How often a training is written to disk (0 seconds: every round), and how many checkpoints are kept."""

    seconds: Annotated[float, Field(ge=0)] = 30.0
    keep: Annotated[int, Field(ge=1)] = 2


class TrainConfig(_Config):
    """Federated training, then the server's side of claim (b)."""

    type: Literal["train"] = "train"
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    defense: Annotated[Defense, DEFENSES] = NoDefense()
    training: FederatedTraining = FederatedTraining()
    execution: Execution = Execution()
    checkpoints: CheckpointConfig = CheckpointConfig()
    auxiliary: Annotated[int, Field(ge=2)] = 100


class AttackConfig(_Config):
    """One attack against a defense and its controls, on untrained networks or a trained one.

    Without `arms`, the defense and its controls are attacked. `norm_mode` is the client's, and known. The
    server has `auxiliary` labeled images of its own. Trials have one network each, or all the same one,
    as the clients of a round have. Every trial has a key of its own, or `updates_per_client` in a row
    have the same one, and the server knows which: rounds of one client, which gets the same network in
    each. The images of a batch are one client's, or a `cohort` shares them evenly and the server sees the
    mean of its updates. At most a `chunk` of trials is attacked at once, shared out among `workers`
    threads (0: one for each core; on a GPU, one).
    """

    type: Literal["attack"] = "attack"
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: Annotated[Attack, ATTACKS] = DLG()
    defense: Annotated[Defense, DEFENSES] = KeyLock()
    arms: tuple[str, ...] = ()
    labels_known: bool = True
    auxiliary: Annotated[int, Field(ge=0)] = 0
    networks: Literal["each", "one"] = "each"
    trials: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 1
    updates_per_client: Annotated[int, Field(ge=1)] = 1
    cohort: Annotated[int, Field(ge=1)] = 1
    norm_mode: Literal["train", "eval"] = "train"
    local: Procedure = Procedure()
    device: Literal["cpu", "cuda"] = "cpu"
    workers: Annotated[int, Field(ge=0)] = 0
    chunk: Annotated[int, Field(ge=1)] = 20

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, values: Any) -> Any:
        """Configurations of before 0.2 have a table `lock`: the defense that is attacked."""
        if not isinstance(values, dict) or not isinstance(values.get("lock"), dict) or "defense" in values:
            return values
        others = {name: value for name, value in values.items() if name != "lock"}
        return others | {"defense": {"type": "keylock"} | values["lock"]}

    @model_validator(mode="after")
    def _check(self) -> AttackConfig:
        repeated = sorted(name for name, count in Counter(self.arms).items() if count > 1)
        if repeated:
            raise ConfigError(f"arms: expected each at most once, got {', '.join(repeated)} more than once.")
        if self.updates_per_client > 1 and (self.networks == "each" or self.trials % self.updates_per_client):
            raise ConfigError(
                'updates_per_client: expected a divisor of the number of trials, and networks = "one", got '
                f'{self.updates_per_client} with {self.trials} trials and networks = "{self.networks}".'
            )
        idle = [f"local.{name}" for name in self.local.without_effect]
        if idle:
            raise ConfigError(
                f"{', '.join(idle)}: without effect on what is sent. Leave that out, or send weights after "
                'whole epochs: local.algorithm = "fedavg", without local.steps.'
            )
        if self.local.augmentation not in AUGMENTATIONS:
            raise ConfigError(
                f"local.augmentation: expected one of {', '.join(AUGMENTATIONS)}, got "
                f"{shown(self.local.augmentation)}."
            )
        if self.batch_size % self.cohort:
            raise ConfigError(
                f"cohort: expected a divisor of batch_size = {self.batch_size}, got {self.cohort}: every "
                "client has as many of the images."
            )
        if isinstance(self.attack, IDLG) and self.batch_size > 1:
            raise ConfigError(
                f"batch_size: iDLG infers the label of one image, got a batch of {self.batch_size}. Use "
                "batch_size = 1, or the attack dlg."
            )
        return self


ExperimentConfig = Annotated[TrainConfig | AttackConfig, Field(discriminator="type")]

_ADAPTER: TypeAdapter[TrainConfig | AttackConfig] = TypeAdapter(ExperimentConfig)
_PARTITION: TypeAdapter[AnyPartition] = TypeAdapter(Annotated[AnyPartition, Field(discriminator="type")])


_REMEDY = "Compare with the config.toml of a run directory."


def parse(values: dict[str, Any], *, source: str, remedy: str = _REMEDY) -> TrainConfig | AttackConfig:
    """An experiment from plain values.

    Args:
        values: As read from TOML.
        source: Where they came from, for messages.
        remedy: What to do if they are not usable.

    Raises:
        ConfigError: With every field that is unknown, missing or out of range.
    """
    experiment: TrainConfig | AttackConfig = _validated(
        _ADAPTER.validate_python,
        values,
        kind=ExperimentConfig,
        subject=f"{source} is not a usable experiment.",
        remedy=remedy,
    )
    return experiment


def _validated(
    validate: Callable[[Any], Any], values: dict[str, Any], *, kind: Any, subject: str, remedy: str = _REMEDY
) -> Any:
    large = [f"{place}: expected a number of at most 64 bits" for place in _large_numbers(values)]
    if large:
        raise ConfigError(gathered(subject, large, remedy))
    try:
        return validate(values)
    except ValidationError as error:
        raise ConfigError(gathered(subject, problems_of(error, kind=kind), remedy)) from error
    except ConfigError as error:  # of fields that do not go together; it may quote what came
        raise ConfigError("\n".join(map(printable, str(error).splitlines()[:_MAX_LINES]))) from error


def _large_numbers(values: dict[str, Any]) -> list[str]:
    """Where integers are that TOML does not allow: Python reads them, and PyTorch fails on them later."""
    left: list[tuple[str, Any]] = [("", values)]
    found = []
    while left:  # not by recursion: what came may be nested deeply
        place, value = left.pop()
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            found.append(printable(place.removeprefix(".")))
        elif isinstance(value, dict):
            left += [(f"{place}.{name}"[:_MAX_PLACE], item) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            left += [(place, item) for item in value]
    return found


def as_written(values: dict[str, Any], *, source: str) -> TrainConfig | AttackConfig:
    """An experiment from a file that had every field when it was written: what is missing came later.

    Trainings of then did not recalibrate the norm statistics that clients keep.

    Raises:
        ConfigError: See `parse`.
    """
    experiment = parse(values, source=source)
    if "norm_statistics" in values.get("training", {}) or not experiment.defense.keeps_tensors:
        return experiment
    return keeping_statistics(experiment)


def keeping_statistics(experiment: TrainConfig | AttackConfig) -> TrainConfig | AttackConfig:
    """The same with norm statistics as the last training left them; an attack is as it was."""
    if isinstance(experiment, AttackConfig):
        return experiment
    earlier = replace(experiment.training, norm_statistics="kept")
    return experiment.model_copy(update={"training": earlier})


def load(path: Path, *, complete: bool = False) -> TrainConfig | AttackConfig:
    """Reads an experiment from a TOML file.

    Args:
        path: The file.
        complete: Whether it had every field when it was written; see `as_written`.

    Raises:
        ConfigError: The file cannot be read, is no TOML, or is not a usable experiment.
    """
    try:
        values = parse_toml(read_file(path, limit=_MAX_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a TOML file ({printable(str(error))}).") from error
    return as_written(values, source=str(path)) if complete else parse(values, source=str(path))


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
            f"{shown(place)}: expected at most {_MAX_PARTS} parts, got {len(path) + 1}. {_REMEDY}"
        )
    for name in path:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{shown(place)}: {shown(name)} is a value, it has no fields. {_REMEDY}")
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
    partition: AnyPartition = _validated(
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


def dump(config: TrainConfig | AttackConfig) -> str:
    """The experiment as TOML, every field included; TOML has no null, so unset fields are left out.

    Raises:
        ConfigError: It could be written, but not be read again.
    """
    text = tomli_w.dumps(values_of(config))
    try:
        if len(text.encode()) > _MAX_BYTES or parse_toml(text) != values_of(config):
            raise ValueError(f"expected at most {_MAX_BYTES} bytes that say the same")
    except ValueError as error:
        raise ConfigError(f"This experiment cannot be kept as TOML ({printable(str(error))}).") from error
    return text


def values_of(config: TrainConfig | AttackConfig) -> dict[str, Any]:
    """The experiment as plain values; unset fields are left out."""
    values: dict[str, Any] = _without_none(_ADAPTER.dump_python(config, mode="json"))
    return values


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
