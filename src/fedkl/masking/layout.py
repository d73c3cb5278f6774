"""Where the numbers of an update lie in a message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from fedkl.errors import MaskingError, gathered
from fedkl.masking import seal
from fedkl.masking.canonical import digest
from fedkl.masking.words import Words
from fedkl.update import TensorSpec

_COUNTS = 2  # samples, weight
_LONG = 8  # bytes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which words a message has, in this order.

    The tag, a number of 32 bytes. Long words (64 bits): samples, weight, metrics, then the whole numbers of
    integer tensors. Then the words of floating-point tensors, as many bits as `words` says. Both parts are
    filled with zeros to whole blocks of the tag. Booleans are not sent.

    Attributes:
        specs: Named tensors in order.
        words: How a number becomes a word.
        metrics: Names of metrics; each is one number, weighted by samples.

    Raises:
        MaskingError: A tensor's dtype is neither floating-point, integer nor boolean.
    """

    specs: Mapping[str, TensorSpec] = field(repr=False)
    words: Words
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        odd = [
            f"'{name}' has dtype {spec.dtype}" for name, spec in self.specs.items() if spec.dtype.is_complex
        ]
        if odd:
            raise MaskingError(gathered("Layout refused.", odd, "Send real and imaginary parts as tensors."))

    @cached_property
    def floats(self) -> dict[str, TensorSpec]:
        """Floating-point tensors, in order."""
        return {name: spec for name, spec in self.specs.items() if spec.dtype.is_floating_point}

    @cached_property
    def integers(self) -> dict[str, TensorSpec]:
        """Integer tensors, in order."""
        rest = {name: spec for name, spec in self.specs.items() if name not in self.floats}
        return {name: spec for name, spec in rest.items() if spec.dtype != torch.bool}

    @cached_property
    def booleans(self) -> dict[str, TensorSpec]:
        """Boolean tensors: every member must have those of the model that is trained on."""
        return {name: spec for name, spec in self.specs.items() if spec.dtype == torch.bool}

    @cached_property
    def whole_numbers(self) -> int:
        """How many whole numbers of integer tensors an update has."""
        return sum(map(elements, self.integers.values()))

    @cached_property
    def numbers(self) -> int:
        """How many floating-point numbers an update has."""
        return sum(map(elements, self.floats.values()))

    def float_places(self) -> Iterator[tuple[str, TensorSpec, slice]]:
        """Floating-point tensors, in order, and where their words lie among those after the long ones."""
        begin = 0
        for name, spec in self.floats.items():
            end = begin + elements(spec)
            yield name, spec, slice(begin, end)
            begin = end

    @cached_property
    def head(self) -> int:
        """Bytes of tag and long words; a multiple of the tag's blocks."""
        longs = _COUNTS + len(self.metrics) + self.whole_numbers
        return seal.SIZE + _whole_blocks(longs * _LONG)

    @cached_property
    def size(self) -> int:
        """Bytes of a message."""
        return self.head + _whole_blocks(self.numbers * self.words.bits // 8)

    def fits(self, words: object) -> bool:
        """Whether something has the form of a message's words."""
        return (
            isinstance(words, np.ndarray)
            and words.dtype == np.uint8
            and words.shape == (self.size,)
            and words.flags.c_contiguous
        )

    @property
    def blocks(self) -> int:
        """Blocks that a tag stands for: all of a message but the tag itself."""
        return (self.size - seal.SIZE) // seal.BLOCK

    @cached_property
    def digest(self) -> bytes:
        """Of all that must agree among members, 32 bytes."""
        tensors = [(name, spec.shape, str(spec.dtype)) for name, spec in self.specs.items()]
        words = (self.words.bits, self.words.members, self.words.max_samples)
        return digest("layout", tensors, words, self.metrics)


def elements(spec: TensorSpec) -> int:
    """How many numbers a tensor has."""
    return torch.Size(spec.shape).numel()


def _whole_blocks(size: int) -> int:
    return -(-size // seal.BLOCK) * seal.BLOCK
