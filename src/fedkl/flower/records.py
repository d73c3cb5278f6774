"""Flower's records as named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor, nn

from fedkl.defenses import KeyLock
from fedkl.errors import UpdateError, gathered
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec


def public_arrays(model: nn.Module, *, defense: KeyLock | None = None) -> ArrayRecord:
    """The server's initial arrays: all public tensors of the locked model, and nothing else.

    Args:
        model: The plain model with its initial weights; not changed.
        defense: As given to the clients' `LockMod`.

    Raises:
        LockError: The model cannot be locked so.

    >>> from fedkl.models import build_model
    >>> model = build_model("lenet", channels=3, classes=10, seed=0, initialization="uniform")
    >>> sorted(public_arrays(model)) == sorted(model.state_dict())
    True
    """
    return arrays_of((defense or KeyLock()).prepare(model).public_state())


def arrays_of(tensors: NamedTensors) -> ArrayRecord:
    """A record that holds exactly these tensors."""
    return ArrayRecord({name: Array(t.detach().cpu().contiguous().numpy()) for name, t in tensors.items()})


def only_arrays(content: RecordDict, *, subject: str) -> ArrayRecord:
    """The one ArrayRecord of a message.

    Raises:
        UpdateError: There are more, or none.
    """
    records = list(content.array_records.values())
    if len(records) != 1:
        raise UpdateError(f"{subject} refused: expected exactly one ArrayRecord, got {len(records)}.")
    return records[0]


def tensors_of(record: ArrayRecord, *, subject: str) -> dict[str, Tensor]:
    """The tensors of a record that came from elsewhere.

    Raises:
        UpdateError: Bytes that are no NumPy array of numbers, each of them by name.
    """
    tensors: dict[str, Tensor] = {}
    problems = []
    for name, array in record.items():
        try:
            tensors[name] = torch.from_numpy(array.numpy())
        except (ValueError, TypeError, OSError, EOFError, MemoryError) as error:
            # the error's own text may quote what came
            problems.append(f"'{name}' is not an array of numbers ({type(error).__name__})")
    if problems:
        raise UpdateError(gathered(f"{subject} refused.", problems, "Send NumPy arrays of numbers."))
    return tensors


def fitted(tensors: NamedTensors, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Finite tensors in the dtypes of a schema; all else as it is.

    Flower's averages leave a count of batches as float64; that and other precisions of the same numbers
    are no fault of the message.
    """
    return {name: _fitted(tensor, specs.get(name)) for name, tensor in tensors.items()}


def _fitted(tensor: Tensor, spec: TensorSpec | None) -> Tensor:
    if spec is None or tensor.dtype == spec.dtype or not tensor.isfinite().all():
        return tensor
    if tensor.is_complex():
        return tensor
    if spec.dtype.is_floating_point:
        return tensor.to(spec.dtype)
    rounds = tensor.is_floating_point() and spec.dtype is not torch.bool
    return tensor.round().to(spec.dtype) if rounds else tensor
