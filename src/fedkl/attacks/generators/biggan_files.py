"""Reads a BigGAN-deep from the files of pytorch-pretrained-biggan, without running code from them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from fedkl.attacks.generators.biggan import BigGANConfig, BigGANDeep
from fedkl.errors import ConfigError, gathered
from fedkl.types import NamedTensors

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Looked for in this order."""

_REMEDY = (
    f"Give the folder of a BigGAN-deep as the package pytorch-pretrained-biggan saves it: {CONFIG_FILE} and "
    f"{WEIGHT_FILES[1]}, or the same tensors as {WEIGHT_FILES[0]}."
)


def load_biggan(folder: Path, *, truncation: float = 1.0) -> BigGANDeep:
    """Reads a BigGAN-deep from the two files that pytorch-pretrained-biggan saves.

    Args:
        folder: With config.json and model.safetensors or pytorch_model.bin.
        truncation: Whose statistics the norms use, above 0 to 1.

    Returns:
        In evaluation mode, without gradients of its weights.

    Raises:
        ConfigError: A file is missing, damaged or not what is expected; the truncation is out of its range.

    Source:
        pytorch-pretrained-biggan 0.1.1. Deviation: between two truncations that have statistics, the nearer
        one counts more; there it counts less, so that a rounding error moves it a whole statistic (at 0.14).
    """
    if not 0 < truncation <= 1:
        raise ConfigError(f"generator: expected 0 < truncation ≤ 1, got {truncation}.")
    config = _read_config(folder)
    place, raw = _read_weights(folder)
    generator = BigGANDeep(config)
    state, problems = _folded(raw, config.n_stats, truncation)
    expected = generator.state_dict()
    del expected["generator.bn.num_batches_tracked"]  # not in the files: only training needs it
    problems += mismatches(expected, state)
    if problems:
        summary = f"generator: {place} does not hold the tensors of its {CONFIG_FILE}."
        raise ConfigError(gathered(summary, sorted(problems), _REMEDY))
    generator.load_state_dict(state, strict=False)
    return generator.eval().requires_grad_(False)


def mismatches(expected: NamedTensors, got: NamedTensors) -> list[str]:
    """What keeps tensors from being loaded in the place of others; empty if nothing does."""
    problems = [f"'{name}' is missing" for name in expected.keys() - got.keys()]
    problems += [f"'{name}' is not expected" for name in got.keys() - expected.keys()]
    for name in expected.keys() & got.keys():
        if expected[name].shape != got[name].shape:
            shapes = f"{tuple(got[name].shape)}, expected {tuple(expected[name].shape)}"
            problems.append(f"'{name}' has shape {shapes}")
        elif not bool(torch.isfinite(got[name]).all()):
            problems.append(f"'{name}' has non-finite values")
    return problems


def _read_config(folder: Path) -> BigGANConfig:
    place = folder / CONFIG_FILE
    names = [field.name for field in fields(BigGANConfig)]
    try:
        text: Any = json.loads(place.read_text(encoding="utf-8"))
        values = {name: text[name] for name in names}
        layers = tuple(tuple(layer) for layer in values.pop("layers"))
    except OSError as error:
        raise ConfigError(f"generator: {place} cannot be read ({error.strerror}). {_REMEDY}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"generator: {place} is damaged; expected JSON with {', '.join(names)}. {_REMEDY}"
        ) from error
    return BigGANConfig(**values, layers=layers)  # which looks at every layer itself


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that was read, and its tensors as float32."""
    place = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if place is None:
        raise ConfigError(f"generator: neither {' nor '.join(WEIGHT_FILES)} is in {folder}. {_REMEDY}")
    try:
        if place.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(place)
        else:
            state = torch.load(place, map_location="cpu", weights_only=True)
        return place, {name: tensor.float() for name, tensor in state.items()}
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"generator: {place} is damaged, or holds more than tensors, which is never loaded. {_REMEDY}"
        ) from error
    except (AttributeError, LookupError, ValueError, TypeError) as error:
        raise ConfigError(f"generator: {place} is no mapping of names to tensors. {_REMEDY}") from error


def _folded(raw: NamedTensors, stats: int, truncation: float) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a `BigGANDeep` from those of a file, and what is wrong with the latter."""
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in raw.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight_orig":
            u, v = raw.get(f"{stem}.weight_u"), raw.get(f"{stem}.weight_v")
            matrix = tensor.flatten(1)
            if u is None or v is None or (*u.shape, *v.shape) != matrix.shape:
                problems.append(f"'{name}' has no weight_u and weight_v that fit it")
            else:
                state[f"{stem}.weight"] = tensor / (u @ matrix @ v)
        elif kind in ("running_means", "running_vars"):
            if len(tensor) != stats:
                problems.append(f"'{name}' has {len(tensor)} statistics, expected {stats}")
            else:
                state[f"{stem}.{kind[:-1]}"] = _between(tensor, truncation)
        elif kind not in ("weight_u", "weight_v"):
            state[name] = tensor
    for name in [name for name in state if name.startswith("generator.conv_to_rgb.")]:
        state[name] = state[name][:3]  # the file computes as many channels as its last block has
    return state, problems


def _between(statistics: Float[Tensor, "stats channels"], truncation: float) -> Float[Tensor, " channels"]:
    place = truncation * (len(statistics) - 1)
    below = min(int(place), len(statistics) - 2)
    return torch.lerp(statistics[below], statistics[below + 1], place - below)
