"""Finds private numbers in what is about to be sent: a net below the allow-list, against accidents.

What it finds: seven numbers in a row or more (eleven in half precision; fewer of small tensors) that stand in
a private tensor in this order, by rows or by columns, with any signs,

* among the numbers of a tensor or list, exact or rounded to float32, float16 or bfloat16;
* in bytes, in any of these precisions or float64, at any offset, in both byte orders;
* in texts, as bytes in base64 or hexadecimal digits, or written out as numbers;
* in lists and texts, rounded to three significant digits, if there are eleven of them.

What it does not find: fewer numbers, numbers in another order or with others between them, anything computed
from them (multiples, sums, differences, compressed or encrypted bytes, other encodings). Zeros, repeated
numbers and numbers that are not finite are no evidence: runs that hold some are not looked for.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.uint32]
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class _Form:
    """A precision: how many numbers in a row are compared, so that chance does not make them agree.

    Attributes:
        dtype: Private numbers are rounded to it.
        run: Numbers that are compared: about 64 bits of evidence, or more.
        least: Of a tensor that is shorter, all are, down to this many.
        zeros: Low bits of a float32 that are zero in this precision.
    """

    dtype: torch.dtype
    run: int
    least: int
    zeros: int


_FORMS = (
    _Form(torch.float32, run=4, least=3, zeros=0),
    _Form(torch.float16, run=6, least=4, zeros=13),
    _Form(torch.bfloat16, run=8, least=6, zeros=16),
)
_STEP = 4  # every fourth run of a private tensor is remembered; all of a small one
_SMALL = 256
_CHUNK = 2**18

_ROUNDED_RUN = 8
_ROUNDING = 0.005  # relative: three significant digits
_ANCHOR = 4  # every fourth number of a list is looked up

_FACTORS = np.random.default_rng(0).integers(2**63, size=8, dtype=np.uint64) * 2 + 1  # of a multilinear hash

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}")
_HEX = re.compile(r"[0-9A-Fa-f]{24,}")


class SecretSearch:
    """Looks for the numbers of some tensors; see the module's text.

    Args:
        secrets: The private tensors, of any shape; those that are not floating-point are left out.
    """

    def __init__(self, secrets: Iterable[Tensor]) -> None:
        floats = [s.detach().cpu().double() for s in secrets if s.is_floating_point() and s.numel() > 0]
        rows = [order for tensor in floats for order in _orders(tensor)]
        self._runs = [runs for form in _FORMS for runs in _remembered(rows, form)]
        self._rows = rows

    def in_numbers(self, numbers: Tensor) -> bool:
        """Whether private numbers stand in a tensor, by rows."""
        if not numbers.is_floating_point():
            return False
        return self._among(numbers.detach().cpu().float().flatten().numpy())

    def in_bytes(self, data: bytes) -> bool:
        """Whether private numbers stand in bytes."""
        return any(self._among(numbers) for numbers in _readings(data))

    def in_text(self, text: str) -> bool:
        """Whether private numbers stand in a text."""
        if self.in_list([float(number) for number in _NUMBER.findall(text)]):
            return True
        if self.in_bytes(text.encode("utf-8", "replace")) or self.in_bytes(text.encode("latin-1", "replace")):
            return True
        return any(self.in_bytes(data) for data in _decoded(text))

    @cached_property
    def _rounded(self) -> _Rounded:
        return _Rounded([row.numpy() for row in self._rows])

    def in_list(self, numbers: Sequence[int | float]) -> bool:
        """Whether private numbers stand in a list, rounded to three significant digits or better.

        Whole numbers are read as bytes, too.
        """
        with np.errstate(all="ignore"):
            values = np.array([_as_float(number) for number in numbers])
            if self._among(values.astype(np.float32)):
                return True
            if len(values) >= _ROUNDED_RUN and self._rounded.found_in(values):
                return True
        if all(isinstance(number, int) for number in numbers):
            return any(self.in_bytes(data) for data in _bytes_of([int(number) for number in numbers]))
        return False

    def _among(self, numbers: Numbers) -> bool:
        return any(runs.found_in(numbers) for runs in self._runs)


def _orders(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers by rows and by columns."""
    yield tensor.flatten()
    if tensor.ndim > 1 and min(tensor.shape[0], tensor[0].numel()) > 1:
        yield tensor.reshape(len(tensor), -1).T.flatten()


def _remembered(rows: Sequence[Tensor], form: _Form) -> Iterator[_Runs]:
    """The runs of one precision, by how long they are."""
    hashes: dict[int, list[NDArray[np.uint64]]] = {}
    for row in rows:
        length = min(form.run, len(row))
        if length < form.least:
            continue
        runs = sliding_window_view(_bits(row.to(form.dtype).float().numpy()), length)
        chosen = runs if len(row) <= _SMALL else np.concatenate((runs[::_STEP], runs[-1:]))
        hashes.setdefault(length, []).append(_hashes(chosen[_evident(chosen)].T))
    for length, found in hashes.items():
        yield _Runs(np.sort(np.concatenate(found)), length=length, zeros=form.zeros)


class _Runs:
    """Runs of one length and precision, as hashes."""

    def __init__(self, hashes: NDArray[np.uint64], *, length: int, zeros: int) -> None:
        self._hashes = hashes
        self._length = length
        self._low = np.uint32(2**zeros - 1)
        self._shift = np.uint64(64 - min(24, 8 + len(hashes).bit_length()))
        self._table = np.zeros(2 ** (64 - int(self._shift)), dtype=np.bool_)
        self._table[hashes >> self._shift] = True

    def found_in(self, numbers: Numbers) -> bool:
        """Whether one of them stands among these numbers."""
        if len(self._hashes) == 0:
            return False
        overlap = self._length - 1
        return any(
            self._in_chunk(_bits(numbers[start : start + _CHUNK + overlap]))
            for start in range(0, max(1, len(numbers) - overlap), _CHUNK)
        )

    def _in_chunk(self, bits: Bits) -> bool:
        count = len(bits) - self._length + 1
        if count < 1:
            return False
        if self._low and np.count_nonzero(bits & self._low == 0) < self._length:
            return False  # no numbers of this precision
        hashes = _hashes([bits[offset : offset + count] for offset in range(self._length)])
        likely = np.flatnonzero(self._table[hashes >> self._shift])
        if len(likely) == 0:
            return False  # of short texts nearly always
        places = np.searchsorted(self._hashes, hashes[likely]).clip(max=len(self._hashes) - 1)
        certain = likely[self._hashes[places] == hashes[likely]]
        return bool(np.any(_evident(sliding_window_view(bits, self._length)[certain])))


class _Rounded:
    """Runs of private numbers, to be compared with rounded ones."""

    def __init__(self, rows: Sequence[NDArray[np.float64]]) -> None:
        gap = np.full(_ROUNDED_RUN, np.nan)  # no run goes from one tensor into the next
        self._numbers = np.abs(np.concatenate([part for row in rows for part in (row, gap)] or [gap]))
        self._order = np.argsort(self._numbers, kind="stable")
        self._sorted = self._numbers[self._order]

    def found_in(self, numbers: NDArray[np.float64]) -> bool:
        """Whether eight of them in a row agree with private numbers to three digits."""
        values = np.abs(numbers)
        last = len(values) - _ROUNDED_RUN
        anchors = {*range(0, last + 1, _ANCHOR), last} if last >= 0 else set()
        return any(self._at(values[start : start + _ROUNDED_RUN]) for start in anchors)

    def _at(self, run: NDArray[np.float64]) -> bool:
        if not (np.isfinite(run).all() and run.min() > 0 and len(np.unique(run)) == len(run)):
            return False
        low, high = (np.searchsorted(self._sorted, run[0] * (1 + s * _ROUNDING)) for s in (-1, 1))
        places = self._order[low:high]
        for offset, number in enumerate(run):
            places = places[places + offset < len(self._numbers)]
            near = np.abs(self._numbers[places + offset] - number) <= _ROUNDING * number
            places = places[near]
        return len(places) > 0


def _bits(numbers: Numbers) -> Bits:
    """Numbers without their signs, as whole numbers."""
    return np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)


def _evident(runs: Bits) -> NDArray[np.bool_]:
    """By run, shape ``(runs, length)``: whether its numbers are finite, not zero and all different."""
    ordered = np.sort(runs, axis=1)
    evident: NDArray[np.bool_] = np.all(ordered[:, 1:] != ordered[:, :-1], axis=1)
    evident &= (ordered[:, 0] != 0) & (ordered[:, -1] < np.uint32(0x7F800000))
    return evident


def _hashes(columns: Iterable[Bits]) -> NDArray[np.uint64]:
    """By run: a hash of its numbers, of which each column holds the first, the second and so on."""
    terms = (column * factor for column, factor in zip(columns, _FACTORS, strict=False))
    total: NDArray[np.uint64] = next(terms)
    for term in terms:
        total += term
    return total


def _readings(data: bytes) -> Iterator[Numbers]:
    """Bytes as numbers, in every precision and byte order, from every offset."""
    with np.errstate(all="ignore"):
        for order in "<>":
            for size in (8, 4, 2):
                for offset in range(min(size, len(data) - 2 * size)):
                    count = (len(data) - offset) // size
                    if size == 2:
                        halves = np.frombuffer(data, f"{order}u2", count, offset).astype(np.uint16)
                        yield halves.view(np.float16).astype(np.float32)
                        yield (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
                    else:
                        yield np.frombuffer(data, f"{order}f{size}", count, offset).astype(np.float32)


def _decoded(text: str) -> Iterator[bytes]:
    """What runs of base64 and of hexadecimal digits in a text stand for, wherever they begin; each once."""
    for run in dict.fromkeys(_BASE64.findall(text)):
        for offset in range(4):
            digits = run[offset:].replace("-", "+").replace("_", "/")
            yield base64.b64decode(digits[: len(digits) // 4 * 4])
    for run in dict.fromkeys(_HEX.findall(text)):
        for offset in range(2):
            yield binascii.unhexlify(run[offset : offset + (len(run) - offset) // 2 * 2])


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _bytes_of(numbers: Sequence[int]) -> Iterator[bytes]:
    """Whole numbers as the bytes that they may be: of one, two, four or eight bytes each."""
    for size in (1, 2, 4, 8):
        if all(-(2 ** (8 * size - 1)) <= number < 2 ** (8 * size) for number in numbers):
            yield b"".join((number % 2 ** (8 * size)).to_bytes(size, "little") for number in numbers)
