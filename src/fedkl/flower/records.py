"""Flower's records as named tensors, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor, nn

from fedkl.defenses import Defense, KeyLock
from fedkl.errors import SecretError, UpdateError, gathered, shown
from fedkl.locking import is_private
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec

_NAMED = 5  # names of one kind that a message gives; of the others, how many they are
_STYPE = "numpy.ndarray"
_NPY = b"\x93NUMPY\x01\x00"  # the version that NumPy writes for all plain arrays
_MAX_HEADER, _MAX_DIMENSIONS = 1024, 32
_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[<|][a-z][0-9]{1,2})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>|(?:[0-9]{1,19}, )*[0-9]{1,19},?)\), \} *\n"
)
_ROUNDING = 1e-6  # how far an average of equal truth values is from them at most
_NUMBERS = ("|b1", "|u1", "<u2", "<u4", "<u8", "|i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16")
_DTYPES = {name.encode(): np.dtype(name) for name in _NUMBERS}


def public_arrays(model: nn.Module, *, defense: Defense | None = None) -> ArrayRecord:
    """The server's initial arrays: all tensors that clients send under a defense, and nothing else.

    Args:
        model: The plain model with its initial weights; not changed.
        defense: As given to the clients' `LockMod` or `TransformMod`.

    Raises:
        LockError: The model cannot be locked so.
        ConfigError: The defense cannot change all that is sent, or the model has numbers that are not finite.
        SecretError: It is one client's own, made by `bake()`.

    >>> from fedkl.models import build_model
    >>> model = build_model("lenet", channels=3, classes=10, seed=0, initialization="uniform")
    >>> sorted(public_arrays(model)) == sorted(model.state_dict())
    True
    """
    if is_private(model):
        raise SecretError(
            f"public_arrays: this {type(model).__name__} is one client's own, made by bake(): it holds what "
            "the lock keeps private. Build the plain model, and load lock.public_state() into it."
        )
    defense = defense or KeyLock()
    split = defense.prepare(model)
    split.check_finite(subject="public_arrays")
    defense.check_sent(split.schema("weights"))
    return arrays_of(split.public_state())


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


def tensors_of(
    record: ArrayRecord, *, subject: str, names: Collection[str] | None = None, legacy: bool = False
) -> dict[str, Tensor]:
    """The tensors of a record that came from elsewhere.

    Only what NumPy writes for an array of plain numbers is read: the npy format, version 1.0, with as many
    bytes as the shape needs. NumPy's own reader also takes archives and what Python can parse as a header.

    Args:
        record: What came.
        subject: First words of an error.
        names: Exactly the names that it must have, in any order; compared before anything is read. None: any.
        legacy: Whether records are read, too, that give neither dtype nor shape beside their bytes, as those
            that Flower makes of a NumPyClient's lists.

    Raises:
        UpdateError: Other names, or bytes that are no NumPy array of numbers, by name.
    """
    if names is not None:
        _check_names(record, names, subject=subject)
    tensors: dict[str, Tensor] = {}
    problems = []
    for name, array in record.items():
        try:
            tensors[name] = _decoded(array, legacy=legacy)
        except UpdateError as error:
            problems.append(f"{shown(name)} is not an array of numbers: {error}")
        except Exception as error:  # its own text may quote what came
            problems.append(f"{shown(name)} is not an array of numbers ({type(error).__name__})")
    if problems:
        raise UpdateError(gathered(f"{subject} refused.", problems, "Send NumPy arrays of numbers."))
    return tensors


def _check_names(record: ArrayRecord, names: Collection[str], *, subject: str) -> None:
    known = set(names)
    missing = [name for name in names if name not in record]
    unexpected = [name for name in record if name not in known]
    if missing or unexpected:
        problems = _counted(missing, "missing") + _counted(unexpected, "unexpected")
        raise UpdateError(
            gathered(f"{subject} refused.", problems, "Send exactly the tensors that were sent.")
        )


def _counted(names: Sequence[str], problem: str) -> list[str]:
    """Few names one by one; of thousands, how many they are."""
    more = len(names) - _NAMED
    lines = [f"{shown(name)} is {problem}" for name in names[:_NAMED]]
    return lines + ([f"{more} more are {problem}"] if more > 0 else [])


def _decoded(array: Array, *, legacy: bool) -> Tensor:
    """The array in these bytes; nothing of its size is allocated before the size is known to be right."""
    data = array.data
    if array.stype != _STYPE or not isinstance(data, bytes) or not data.startswith(_NPY):
        raise UpdateError("expected NumPy's npy format, version 1.0")
    start = len(_NPY) + 2
    end = start + int.from_bytes(data[len(_NPY) : start], "little")
    header = _HEADER.fullmatch(data[start:end]) if end - start <= _MAX_HEADER else None
    if header is None:
        raise UpdateError("its header is not one that NumPy writes for plain numbers")
    dtype, shape = _DTYPES.get(header["dtype"]), tuple(map(int, re.findall(rb"\d+", header["shape"])))
    if dtype is None or len(shape) > _MAX_DIMENSIONS:
        raise UpdateError(f"expected plain numbers and at most {_MAX_DIMENSIONS} dimensions")
    if len(data) - end != math.prod(shape) * dtype.itemsize:
        raise UpdateError("its shape needs another number of bytes than it has")
    said = (array.dtype, tuple(array.shape))
    if said != (str(dtype), shape) and not (legacy and said == ("", ())):
        raise UpdateError("its record gives another shape or dtype than its bytes do")
    return _tensor(memoryview(data)[end:], dtype, shape, fortran=header["fortran"] == b"True")


def _tensor(data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], *, fortran: bool) -> Tensor:
    """A tensor with a memory of its own, in C order."""
    flat = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    if dtype == np.bool_ and flat.size and flat.view(np.uint8).max() > 1:
        raise UpdateError("expected zeros and ones for truth values")
    return torch.from_numpy(np.array(flat.reshape(shape, order="F" if fortran else "C"), order="C"))


def ordered(record: ArrayRecord, names: Iterable[str]) -> ArrayRecord:
    """The arrays of a record in this order, by which some strategies go."""
    return ArrayRecord({name: record[name] for name in names})


def fitted(tensors: NamedTensors, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Tensors in the dtypes of a schema, as far as their numbers are numbers of these dtypes.

    Flower's averages leave a count of batches as float64, and truth values too, which come back where all
    clients have the same ones; that and other precisions of the same numbers are no fault of the message. A
    count that is not finite or too large stays in the dtype in which it came, and a number that is too large
    for its precision becomes infinite: whoever checks the result finds both.
    """
    return {name: _fitted(tensor, specs.get(name)) for name, tensor in tensors.items()}


def _fitted(tensor: Tensor, spec: TensorSpec | None) -> Tensor:
    if spec is None or tensor.dtype == spec.dtype:
        return tensor
    if tensor.is_complex() or spec.dtype.is_complex:
        return tensor
    if spec.dtype is torch.bool:
        return _agreed(tensor) if tensor.dtype is torch.float64 else tensor
    if spec.dtype.is_floating_point:
        return tensor.to(spec.dtype)
    return _rounded(tensor, spec.dtype) if tensor.is_floating_point() else tensor


def _agreed(mean: Tensor) -> Tensor:
    """Truth values, if all clients have the same ones: an average of others is none."""
    near = mean.clamp(0, 1).round()
    return near.bool() if bool(((mean - near).abs() <= _ROUNDING).all()) else mean


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts, if all are within the dtype's range: of others, and of NaN, a conversion makes any number."""
    limits = torch.iinfo(dtype)
    whole = tensor.round()
    fits = bool(((whole >= float(limits.min)) & (whole < float(limits.max + 1))).all())
    return whole.to(dtype) if fits else tensor
