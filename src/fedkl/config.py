"""Experiments as data: what a run directory's config.toml holds, complete enough to repeat the run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedkl.attacks import DLG, AnyAttack
from fedkl.defenses import AnyDefense, KeyLock, NoDefense
from fedkl.errors import ConfigError, gathered
from fedkl.federated import FederatedTraining

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Config):
    """Which dataset, and where its files are (None: `fedkl.data.default_root()`)."""

    name: str = "mnist-sample"
    root: str | None = None


class ModelConfig(_Config):
    """Which model of the zoo, and how its weights start."""

    name: str = "lenet"
    initialization: Literal["default", "uniform"] = "uniform"


class TrainConfig(_Config):
    """Federated training, then the server's side of claim (b)."""

    type: Literal["train"] = "train"
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    defense: Annotated[AnyDefense, Field(discriminator="type")] = NoDefense()
    training: FederatedTraining = FederatedTraining()
    auxiliary: Annotated[int, Field(ge=2)] = 100


class AttackConfig(_Config):
    """One attack against the key-lock and its controls, on untrained networks."""

    type: Literal["attack"] = "attack"
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: Annotated[AnyAttack, Field(discriminator="type")] = DLG()
    lock: KeyLock = KeyLock()
    arms: tuple[str, ...] = ()
    labels_known: bool = True
    trials: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 1


ExperimentConfig = Annotated[TrainConfig | AttackConfig, Field(discriminator="type")]

_ADAPTER: TypeAdapter[TrainConfig | AttackConfig] = TypeAdapter(ExperimentConfig)


def parse(values: dict[str, Any], *, source: str) -> TrainConfig | AttackConfig:
    """An experiment from plain values.

    Args:
        values: As read from TOML.
        source: Where they came from, for messages.

    Raises:
        ConfigError: With every field that is unknown, missing or out of range.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        problems = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigError(gathered(f"{source} is not a usable experiment.", problems, _REMEDY)) from error


_REMEDY = "Compare with the config.toml of a run directory."


def load(path: Path) -> TrainConfig | AttackConfig:
    """Reads an experiment from a TOML file.

    Raises:
        ConfigError: The file cannot be read, is no TOML, or is not a usable experiment.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error}).") from error
    return parse(values, source=str(path))


def dump(config: TrainConfig | AttackConfig) -> str:
    """The experiment as TOML, every field included; TOML has no null, so unset fields are left out."""
    return tomli_w.dumps(values_of(config))


def values_of(config: TrainConfig | AttackConfig) -> dict[str, Any]:
    """The experiment as plain values; unset fields are left out."""
    values: dict[str, Any] = _without_none(_ADAPTER.dump_python(config, mode="json"))
    return values


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
