"""One pass over a message: numbers become words, words are tagged, masks are added; and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkl.errors import MaskingError, gathered
from fedkl.masking import seal
from fedkl.masking.layout import Layout, elements
from fedkl.masking.stream import CHUNK, MaskStream, Room
from fedkl.types import NamedTensors
from fedkl.update import check_tensors

Bytes = NDArray[np.uint8]
LONG = np.dtype("<u8")
_MAGIC = 1.5 * 2.0**52  # a float64 around it has its nearest whole number in its last bits
_MAGIC_BITS = np.uint64(0x4338000000000000)
_METRIC_FRACTION, _METRIC_LIMIT = 20, 2**13
_INTEGER_LIMIT = 2**30
_OUT_OF_RANGE = "Sum refused: {} has words beyond what its samples allow: a member sent what no update gives."


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """What a member gives to a sum.

    Attributes:
        tensors: By name, as the layout says; finite, within the range of words.
        samples: How many samples it stands for.
        metrics: By name, as the layout says.
    """

    tensors: NamedTensors = field(repr=False)
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mean:
    """What a sum gives.

    Attributes:
        tensors: Weighted means by name, in each tensor's own dtype.
        samples: Of all contributions.
        metrics: Means weighted by samples.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    samples: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Streams to add and streams to take away."""

    plus: Sequence[MaskStream] = ()
    minus: Sequence[MaskStream] = ()


def encoded(
    layout: Layout, contribution: Contribution, *, masks: Masks, tag_key: tuple[bytes, bytes]
) -> Bytes:
    """The message of a contribution, masked.

    Args:
        layout: Where things lie.
        contribution: What is given.
        masks: Added to all words.
        tag_key: r and s of the tag, 16 and 32 bytes.

    Returns:
        Shape ``(layout.size,)``.

    Raises:
        MaskingError: The contribution does not fit the layout, or is out of the range of words.
    """
    message = np.empty(layout.size, dtype=np.uint8)
    weight = _weight(layout, contribution)
    message[: seal.SIZE] = 0
    message[seal.SIZE : layout.head].view(LONG)[:] = _longs(layout, contribution, weight)
    body = _Body(layout, contribution.tensors, weight)
    r, s = tag_key
    polynomial = seal.Polynomial(r)
    room = Room()
    for begin, end in _chunks(layout.size):
        body.write(message, max(begin, layout.head), end)
        polynomial.update(message[max(begin, seal.SIZE) : end].data)
        _mask(message[begin:end], layout, begin, masks, room)
    add_to_tag(message, polynomial.value() + seal.number(s))
    return message


def add_to_tag(message: Bytes, value: int) -> None:
    """Adds a number to the tag at the front of a message, in place."""
    tag = message[: seal.SIZE]
    tag[:] = np.frombuffer(seal.added(tag.tobytes(), value), dtype=np.uint8)


def unmasked(
    layout: Layout, message: Bytes, *, masks: Masks, on_chunk: Callable[[int, Bytes], None] | None = None
) -> None:
    """Adds and takes away masks in place, chunk by chunk.

    Args:
        layout: Where things lie.
        message: Changed.
        masks: Those of `plus` are added, those of `minus` are taken away.
        on_chunk: Is given every chunk afterwards, with its place.
    """
    room = Room()
    for begin, end in _chunks(layout.size):
        chunk = message[begin:end]
        _mask(chunk, layout, begin, masks, room)
        if on_chunk is not None:
            on_chunk(begin, chunk)


class Opening:
    """Reads a sum while its masks are taken away; give `chunk` to `unmasked`.

    Args:
        layout: Where things lie.
        r: The first half of the tag's key.
    """

    def __init__(self, layout: Layout, *, r: bytes) -> None:
        self._layout, self._r = layout, r
        self._polynomial = seal.Polynomial(r)
        self._tag = b""

    def chunk(self, begin: int, chunk: Bytes) -> None:
        """The next chunk of the sum in the clear."""
        self._polynomial.update(chunk[max(seal.SIZE - begin, 0) :].data)
        if begin == 0:
            self._tag = chunk[: seal.SIZE].tobytes()

    def holds(self, pads: Sequence[bytes]) -> bool:
        """Whether the sum's tag is that of these uploads; after the last chunk."""
        own, blocks = self._polynomial.value(), self._layout.blocks
        return seal.holds(total=self._tag, pads=pads, own=own, r=self._r, blocks=blocks)


def decoded(layout: Layout, message: Bytes, *, members: int, booleans: NamedTensors) -> Mean:
    """The means of a sum in the clear.

    Args:
        layout: Where things lie.
        message: The sum.
        members: How many uploads are in it.
        booleans: Boolean tensors of the model, which are not part of a sum.

    Raises:
        MaskingError: It is the sum of nothing, or has words that no sum of so many honest uploads has.
    """
    longs = message[seal.SIZE : layout.head].view(LONG)
    samples, weight = int(longs[0]), int(longs[1])
    place = 2 + len(layout.metrics)
    _check_sum(layout, longs, members)
    metrics = {
        name: (int(word) / samples - (_METRIC_LIMIT << _METRIC_FRACTION)) / 2**_METRIC_FRACTION
        for name, word in zip(layout.metrics, longs[2:place], strict=True)
    }
    found: dict[str, Tensor] = dict(booleans)
    for name, spec in layout.integers.items():
        count = elements(spec)
        means = np.rint(longs[place : place + count] / samples) - _INTEGER_LIMIT
        found[name] = torch.from_numpy(means).to(spec.dtype).reshape(spec.shape)
        place += count
    found |= _decoded_floats(layout, message, weight)
    ordered = {name: found[name] for name in layout.specs}
    return Mean(tensors=ordered, samples=samples, metrics=metrics)


def _check_sum(layout: Layout, longs: NDArray[np.uint64], members: int) -> None:
    """A tag holds for whatever a member gave to it; the range is looked at here."""
    samples, weight = int(longs[0]), int(longs[1])
    words, place = layout.words, 2 + len(layout.metrics)
    most = members * words.max_samples, members * words.weight(words.max_samples)
    if not (1 <= samples <= most[0] and 1 <= weight <= most[1]):
        raise MaskingError(f"Sum refused: expected 1 to {most[0]} samples of {members} members.")
    counts = {
        "its metrics": (longs[2:place], 2 * (_METRIC_LIMIT << _METRIC_FRACTION) * samples),
        "its whole numbers": (longs[place : place + layout.whole_numbers], 2 * _INTEGER_LIMIT * samples),
    }
    for what, (found, limit) in counts.items():
        if found.size and int(found.max()) > limit:
            raise MaskingError(_OUT_OF_RANGE.format(what))


def _decoded_floats(layout: Layout, message: Bytes, weight: int) -> dict[str, Tensor]:
    words = layout.words
    body = message[layout.head :].view(words.dtype)
    offset, scale = words.offset(weight), 1 / words.scale(weight)
    step = CHUNK // LONG.itemsize
    room = np.empty(step, dtype=np.int64)
    found = {}
    for name, spec, place in layout.float_places():
        own = body[place]
        values = torch.empty(len(own), dtype=spec.dtype)
        for begin in range(0, len(own), step):
            raw = own[begin : begin + step]
            piece = room[: len(raw)]
            if int(raw.max()) > 2 * offset:
                raise MaskingError(_OUT_OF_RANGE.format(f"'{name}'"))
            np.subtract(raw.astype(np.int64), np.int64(offset), out=piece)
            values[begin : begin + len(piece)] = torch.from_numpy(piece * scale)
        found[name] = values.reshape(spec.shape)
    return found


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, CHUNK):
        yield begin, min(begin + CHUNK, size)


def _mask(chunk: Bytes, layout: Layout, begin: int, masks: Masks, room: Room) -> None:
    """The tag modulo p, long words modulo 2⁶⁴, the others modulo their own size."""
    tag = max(seal.SIZE - begin, 0)
    cut = min(max(layout.head - begin, tag), len(chunk))
    parts = [(slice(tag, cut), LONG), (slice(cut, None), layout.words.dtype)]
    for streams, apply, sign in ((masks.plus, np.add, 1), (masks.minus, np.subtract, -1)):
        for stream in streams:
            noise = stream.next(len(chunk), room)
            if tag:
                add_to_tag(chunk, sign * seal.number(noise[:tag].tobytes()))
            for part, kind in parts:
                words = chunk[part].view(kind)
                apply(words, noise[part].view(kind), out=words)


def _weight(layout: Layout, contribution: Contribution) -> int:
    most = layout.words.max_samples
    if type(contribution.samples) is not int or not 1 <= contribution.samples <= most:
        raise MaskingError(
            f"Upload refused: expected 1 to {most} samples (the roster's bound), got {contribution.samples}."
        )
    check_tensors(
        contribution.tensors,
        layout.specs,
        subject="Upload refused.",
        remedy="Send exactly the tensors of the layout.",
        error=MaskingError,
        finite=False,  # the words themselves show it
    )
    return layout.words.weight(contribution.samples)


def _longs(layout: Layout, contribution: Contribution, weight: int) -> NDArray[np.uint64]:
    """The long words after the tag."""
    longs = np.zeros((layout.head - seal.SIZE) // LONG.itemsize, dtype=LONG)
    samples = contribution.samples
    values = [samples, weight, *_metric_words(layout, contribution)]
    longs[: len(values)] = values
    place, problems = len(values), []
    for name in layout.integers:
        tensor = contribution.tensors[name].detach().cpu().reshape(-1)
        whole = tensor.to(torch.int64).numpy()
        least = -_INTEGER_LIMIT if tensor.dtype.is_signed else 0  # 2⁶³ and more came out negative
        if whole.size and (whole.min() < least or whole.max() > _INTEGER_LIMIT):
            problems.append(f"'{name}' has whole numbers beyond ±2^30")
            continue
        longs[place : place + whole.size] = (whole + _INTEGER_LIMIT) * samples
        place += whole.size
    if problems:
        raise MaskingError(gathered("Upload refused.", problems, "Keep such tensors private."))
    return longs


def _metric_words(layout: Layout, contribution: Contribution) -> list[int]:
    if set(contribution.metrics) != set(layout.metrics):
        names = ", ".join(layout.metrics) or "none"
        raise MaskingError(f"Upload refused: expected the metrics {names}; others came, or some are missing.")
    words = []
    for name in layout.metrics:
        value = contribution.metrics[name]
        if not abs(value) <= _METRIC_LIMIT:  # also of NaN
            raise MaskingError(f"Upload refused: metric '{name}' is not a number within ±2^13.")
        words.append(round((value + _METRIC_LIMIT) * 2**_METRIC_FRACTION) * contribution.samples)
    return words


class _Body:
    """Writes the words of floating-point tensors, from left to right."""

    def __init__(self, layout: Layout, tensors: NamedTensors, weight: int) -> None:
        self._layout = layout
        words = layout.words
        self._scale, self._offset = float(words.scale(weight)), words.offset(weight)
        self._pieces = [(name, _plain(tensors[name])) for name in layout.floats]
        self._spare = np.empty(CHUNK // 4, dtype=np.float64)

    def write(self, message: Bytes, begin: int, end: int) -> None:
        """Fills the bytes of a message from `begin` to `end`.

        Raises:
            MaskingError: A number is not finite or beyond the range.
        """
        words = message[begin:end].view(self._layout.words.dtype)
        filled = 0
        while filled < len(words) and self._pieces:
            name, values = self._pieces[0]
            count = min(len(values), len(words) - filled)
            self._put(name, values[:count], words[filled : filled + count])
            filled += count
            if count == len(values):
                self._pieces.pop(0)
            else:
                self._pieces[0] = (name, values[count:])
        words[filled:] = 0

    def _put(self, name: str, values: NDArray[np.floating], words: NDArray[np.unsignedinteger]) -> None:
        if not len(values):
            return
        long = words.dtype.itemsize == LONG.itemsize
        numbers = words.view(np.float64) if long else self._spare[: len(values)]
        np.multiply(values, self._scale, out=numbers, dtype=np.float64)
        numbers += _MAGIC
        bits = numbers.view(LONG)
        bits -= _MAGIC_BITS - np.uint64(self._offset)
        if int(bits.max()) > 2 * self._offset:  # NaN and what is negative are huge
            raise MaskingError(
                f"Upload refused: '{name}' has values beyond ±{self._layout.words.limit}, the range of "
                f"{self._layout.words.bits}-bit words, or not finite. Lower the learning rate, keep such "
                "tensors private, or take 64-bit words."
            )
        if not long:
            words[:] = bits


def _plain(tensor: Tensor) -> NDArray[np.floating]:
    """A tensor's numbers in a row; a view where that is possible."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    values: NDArray[np.floating] = flat.numpy()
    return values
