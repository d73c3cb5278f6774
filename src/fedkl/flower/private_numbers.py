"""Finds private numbers in what is about to be sent, whatever name or precision they have there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ENCODINGS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FIRST = 3  # different numbers in a row: a search looks at every third number only
_RUN = 8  # that many are compared; by chance, three might agree where numbers are coarse

Run = NDArray[np.float32]


class PrivateNumbers:
    """Runs of numbers that stand in secret tensors.

    A run starts at the first three numbers in a row that are different and not zero. Tensors without such a
    place (constants, counts) carry too little to be told from chance.

    Args:
        secrets: The secret tensors.
    """

    def __init__(self, secrets: Iterable[Tensor]) -> None:
        floats = [secret.detach().cpu().flatten() for secret in secrets if secret.is_floating_point()]
        forms = [secret.to(kind) for secret in floats for kind in _ENCODINGS]
        starts = [(form, start) for form in forms if (start := _start(form)) is not None]
        self._patterns = {_bytes(form[start : start + _RUN]) for form, start in starts}
        self._runs: dict[float, list[tuple[int, Run]]] = {}
        for form, start in starts:
            run = form[start : start + _RUN].float().numpy()
            for place in range(_FIRST):
                self._runs.setdefault(float(run[place]), []).append((place, run))
        self._firsts = np.array(list(self._runs), dtype=np.float32)
        self._table = np.zeros(2**16, dtype=np.bool_)
        self._table[_hashes(self._firsts)] = True

    def in_bytes(self, data: bytes) -> bool:
        """Whether a run of private numbers stands in bytes, in any floating-point encoding."""
        return any(pattern in data for pattern in self._patterns)

    def in_numbers(self, numbers: Tensor) -> bool:
        """Whether a run of private numbers stands among numbers, exact or rounded to half precision."""
        if not numbers.is_floating_point():
            return False
        flat: Run = numbers.detach().cpu().float().flatten().numpy()
        looked_at = flat[::_FIRST]
        candidates = np.flatnonzero(self._table[_hashes(looked_at)])
        certain = candidates[np.isin(looked_at[candidates], self._firsts)] * _FIRST
        return any(self._is_run(flat, int(position)) for position in certain)

    def _is_run(self, flat: Run, position: int) -> bool:
        for place, run in self._runs[float(flat[position])]:
            begin = position - place
            if begin >= 0 and np.array_equal(flat[begin : begin + len(run)], run):
                return True
        return False


def _start(form: Tensor) -> int | None:
    """Where the first three different numbers in a row begin, none of them zero."""
    rows = form.unfold(0, _FIRST, 1) if len(form) >= _FIRST else form.new_zeros(0, _FIRST)
    a, b, c = rows.unbind(1)
    good = ((rows != 0).all(1) & (a != b) & (b != c) & (a != c)).nonzero()
    return int(good[0]) if len(good) else None


def _hashes(numbers: Run) -> NDArray[np.uint16]:
    halves = np.ascontiguousarray(numbers).view(np.uint16).reshape(-1, 2)
    hashes: NDArray[np.uint16] = halves[:, 0] ^ halves[:, 1]
    return hashes


def _bytes(form: Tensor) -> bytes:
    return form.contiguous().view(torch.uint8).numpy().tobytes()


def numbers_in(values: Iterable[object]) -> Iterator[Tensor]:
    """The lists of numbers among a record's values, as tensors."""
    for value in values:
        if isinstance(value, list) and value and isinstance(value[0], float):
            yield torch.tensor(value, dtype=torch.float64)
