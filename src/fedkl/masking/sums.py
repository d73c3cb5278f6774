"""A sealed sum as named tensors, and back: for checkpoints, and for whoever opens one later."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from fedkl.errors import ConfigError
from fedkl.lockfile import byte_tensor, bytes_of
from fedkl.masking.messages import SealedSum
from fedkl.masking.schedule import Call
from fedkl.parsing import parse_json_object


def sum_tensors(total: SealedSum | None) -> dict[str, Tensor]:
    """A sum as named tensors; nothing for none."""
    if total is None:
        return {}
    call = total.call
    about = {
        "run": call.run.hex(),
        "round": call.round,
        "attempt": call.attempt,
        "cohort": call.cohort,
        "settings": call.settings.hex(),
        "model": total.model.hex(),
        "transcript": total.transcript.hex(),
        "listed": {name: nonce.hex() for name, nonce in total.listed.items()},
    }
    words = torch.from_numpy(total.words)
    return {"sum/about": byte_tensor(json.dumps(about).encode()), "sum/words": words}


def sum_of(tensors: Mapping[str, Tensor]) -> SealedSum | None:
    """The sum that `sum_tensors` was given.

    Raises:
        ConfigError: It is damaged.
    """
    if "sum/about" not in tensors:
        return None
    try:
        about = parse_json_object(bytes_of(tensors["sum/about"]))
        call = Call(
            run=bytes.fromhex(about["run"]),
            round=about["round"],
            attempt=about["attempt"],
            cohort=tuple(about["cohort"]),
            settings=bytes.fromhex(about.get("settings", "")),
        )
        return SealedSum(
            call=call,
            model=bytes.fromhex(about["model"]),
            transcript=bytes.fromhex(about["transcript"]),
            listed={name: bytes.fromhex(nonce) for name, nonce in about["listed"].items()},
            words=tensors["sum/words"].numpy(),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("The checkpoint's last sum is damaged.") from error
