"""Experiments as data: what a run directory's config.toml holds, complete enough to repeat the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedkl.attacks import ATTACKS, DLG, IDLG, Attack
from fedkl.data import AUGMENTATIONS
from fedkl.defenses import DEFENSES, Defense, KeyLock, NoDefense
from fedkl.errors import ConfigError, gathered, printable, shown
from fedkl.federated import Execution, FederatedTraining
from fedkl.files import read_file
from fedkl.parsing import parse_toml
from fedkl.protocol import Procedure
from fedkl.validation import problems_of

_MAX_LINES = 60  # of a message
_MAX_BYTES = 2**18  # of a file; a complete experiment takes two thousand
_MAX_PLACE = 301  # characters of a place, whatever came


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


REMEDY = "Compare with the config.toml of a run directory."
"""What to do about a field that is wrong."""


def parse(values: dict[str, Any], *, source: str, remedy: str = REMEDY) -> TrainConfig | AttackConfig:
    """An experiment from plain values.

    Args:
        values: As read from TOML.
        source: Where they came from, for messages.
        remedy: What to do if they are not usable.

    Raises:
        ConfigError: With every field that is unknown, missing or out of range.
    """
    experiment: TrainConfig | AttackConfig = validated(
        _ADAPTER.validate_python,
        values,
        kind=ExperimentConfig,
        subject=f"{source} is not a usable experiment.",
        remedy=remedy,
    )
    return experiment


def validated(
    validate: Callable[[Any], Any], values: dict[str, Any], *, kind: Any, subject: str, remedy: str = REMEDY
) -> Any:
    """What pydantic makes of values, with its complaints in sentences.

    Args:
        validate: pydantic's.
        values: As they came.
        kind: The type that is wanted, for the places of complaints.
        subject: The first sentence of a complaint.
        remedy: The last one.

    Raises:
        ConfigError: With every field that is unknown, missing or out of range.
    """
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
