"""All surfaces by name; a new one is a new file and a line here."""

from __future__ import annotations

import importlib
import os

from tests.fuzzing.surface import Surface

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported

_CLASSES = {
    "keys": "Keys",
    "members": "Members",
    "updates": "Updates",
    "models": "Models",
    "configs": "Configs",
    "flags": "Flags",
    "run_directories": "RunDirectories",
    "checkpoints": "FederatedCheckpoints",
    "datasets": "Datasets",
    "guard": "GuardReplies",
    "mod": "ModMessages",
    "rounds": "FlowerRounds",
}
_FLOWER = ("guard", "mod", "rounds")


def _has_flower() -> bool:
    """Flower needs Python 3.11."""
    try:
        importlib.import_module("fedkl.flower")
    except ImportError:
        return False
    except Exception as error:  # without Flower, fedkl.flower says what to install
        if type(error).__name__ != "ConfigError":
            raise
        return False
    return True


def names() -> list[str]:
    """The surfaces that can be fuzzed here."""
    return [name for name in _CLASSES if name not in _FLOWER or _has_flower()]


def surface(name: str) -> Surface:
    """A surface, with all that it reuses between inputs."""
    module = importlib.import_module(f"tests.fuzzing.surfaces.{name}")
    made: Surface = getattr(module, _CLASSES[name])()
    return made
