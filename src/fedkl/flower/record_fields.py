"""What the records of masked sums consist of: written, and read with its form checked.

What it means is for `fedkl.masking` to accept or refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedkl.errors import MaskingError, UpdateError
from fedkl.flower.records import tensors_of
from fedkl.masking import Call
from fedkl.masking.words import MAX_MEMBERS

PREFIX = "fedkl-masks"
"""How the names of all records begin that are not the app's own."""
WORDS = f"{PREFIX}.words"
"""Name of the record that holds the words of an upload or a sum."""

_MAX_TEXT = 1000
_Value = TypeVar("_Value", str, bytes, int)


class Fields:
    """The fields of a ConfigRecord that came from elsewhere.

    Args:
        content: The message.
        name: Of the record.

    Raises:
        MaskingError: There is no such record.
    """

    def __init__(self, content: RecordDict, name: str) -> None:
        record = content.get(name)
        if not isinstance(record, ConfigRecord):
            raise MaskingError(f"Refused: expected the record {name}.")
        self._record, self._name = record, name

    def one(self, field: str, kind: type[_Value]) -> _Value:
        """A field that holds one value.

        Raises:
            MaskingError: It does not.
        """
        return self._checked(self._record.get(field), field, kind)

    def many(self, field: str, kind: type[_Value]) -> list[_Value]:
        """A field that holds a list of values.

        Raises:
            MaskingError: It does not.
        """
        values = self._record.get(field)
        if not isinstance(values, list):
            raise self.odd(field)
        return [self._checked(value, field, kind) for value in values]

    def odd(self, field: str) -> MaskingError:
        """What to raise where a field makes no sense."""
        return MaskingError(f"Refused: {self._name}: {field} is not what fedkl sends there.")

    def _checked(self, value: object, field: str, kind: type[_Value]) -> _Value:
        if type(value) is not kind or (isinstance(value, str) and len(value) > _MAX_TEXT):
            raise self.odd(field)
        return value


def call_fields(call: Call) -> dict[str, Any]:
    """A call as fields of a record."""
    return {
        "run": call.run,
        "round": call.round,
        "attempt": call.attempt,
        "cohort": list(call.cohort),
        "settings": call.settings,
    }


def call_in(fields: Fields) -> Call:
    """The call that `call_fields` wrote."""
    return Call(
        run=fields.one("run", bytes),
        round=fields.one("round", int),
        attempt=fields.one("attempt", int),
        cohort=tuple(fields.many("cohort", str)),
        settings=fields.one("settings", bytes),
    )


def pairs(
    values: Mapping[str, bytes], names: str = "listed", data: str = "nonces"
) -> dict[str, list[str] | list[bytes]]:
    """Bytes by member as two fields of a record."""
    return {names: list(values), data: list(values.values())}


def paired(fields: Fields, names: str = "listed", data: str = "nonces") -> dict[str, bytes]:
    """What `pairs` wrote."""
    keys, values = fields.many(names, str), fields.many(data, bytes)
    if len(keys) != len(values) or len(set(keys)) < len(keys) or len(keys) > MAX_MEMBERS:
        raise fields.odd(names)
    return dict(zip(keys, values, strict=True))


def words_record(words: NDArray[np.uint8]) -> ArrayRecord:
    """The words of an upload or a sum as a record; `words_of` reads it."""
    return ArrayRecord({"words": Array(words)})


def tensors_in(content: RecordDict, name: str, *, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of a record, which are exactly those named.

    Raises:
        MaskingError: There is no such record, or it holds others.
    """
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise MaskingError(f"Refused: expected the record {name}.")
    try:
        return tensors_of(record, subject=f"Record {name}", names=list(names))
    except UpdateError as error:
        raise MaskingError(str(error)) from error


def words_of(content: RecordDict) -> NDArray[np.uint8]:
    """The words of an upload or a sum, shape ``(bytes,)``.

    Raises:
        MaskingError: There are none.
    """
    words = tensors_in(content, WORDS, names=["words"])["words"]
    if words.dtype is not torch.uint8 or words.dim() != 1:
        raise MaskingError("Refused: expected words as a row of bytes.")
    return words.numpy()
