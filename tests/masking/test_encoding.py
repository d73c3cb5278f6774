"""Numbers as words and back, beside exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkl.errors import MaskingError
from fedkl.masking import Contribution, Layout, Words, seal
from fedkl.masking.encoding import LONG, Bytes, Masks, Mean, decoded, encoded
from fedkl.update import TensorSpec

KEY = (bytes(range(16)), bytes(range(32, 64)))
WORDS = {bits: Words(bits=bits, members=5, max_samples=4000) for bits in (64, 32)}
LIMITS = {64: 1024.0, 32: 8.0}


def layout_of(count: int, *, words: Words, dtype: torch.dtype = torch.float32) -> Layout:
    specs = {
        "v": TensorSpec(shape=(count,), dtype=dtype),
        "k": TensorSpec(shape=(2,), dtype=torch.int64),
    }
    return Layout(specs=specs, words=words, metrics=("loss",))


def contribution(values: torch.Tensor, *, samples: int, whole: int = 0, loss: float = 0.0) -> Contribution:
    return Contribution(
        tensors={"v": values, "k": torch.full((2,), whole)}, samples=samples, metrics={"loss": loss}
    )


def clear(layout: Layout, given: Contribution) -> Bytes:
    """A message without masks."""
    return encoded(layout, given, masks=Masks(), tag_key=KEY)


def summed(layout: Layout, messages: list[Bytes]) -> Bytes:
    """Their sum, word by word; its tag means nothing."""
    total = np.zeros(layout.size, dtype=np.uint8)
    for part, kind in ((slice(0, layout.head), LONG), (slice(layout.head, None), word_of(layout))):
        for message in messages:
            total[part].view(kind)[:] += message[part].view(kind)
    return total


def word_of(layout: Layout) -> np.dtype:
    return np.dtype(f"<u{layout.words.bits // 8}")


def body(layout: Layout, message: Bytes, count: int) -> list[int]:
    return [int(word) for word in message[layout.head :].view(word_of(layout))[:count]]


def opened(layout: Layout, messages: list[Bytes]) -> Mean:
    return decoded(layout, summed(layout, messages), members=len(messages), booleans={})


@pytest.mark.parametrize("bits", [64, 32])
@given(data=st.data())
@settings(max_examples=40)
def test_a_word_is_the_nearest_whole_number(bits, data):
    limit = LIMITS[bits]
    numbers = data.draw(st.lists(st.floats(-limit, limit, width=32), min_size=1, max_size=30))
    samples = data.draw(st.integers(1, 4000))
    words = WORDS[bits]
    layout = layout_of(len(numbers), words=words)
    message = clear(layout, contribution(torch.tensor(numbers), samples=samples))
    for number, word in zip(numbers, body(layout, message, len(numbers)), strict=True):
        exact = Fraction(number) * samples * 2**words.fraction
        assert word == round(exact) + words.offset(samples)  # both round half to even


@pytest.mark.parametrize("bits", [64, 32])
@given(data=st.data())
@settings(max_examples=25)
def test_a_sum_is_the_weighted_mean_as_near_as_was_said(bits, data):
    limit, words = LIMITS[bits], WORDS[bits]
    count = data.draw(st.integers(1, 5))
    rows = st.lists(st.floats(-limit, limit, width=32), min_size=3, max_size=3)
    members = [(data.draw(rows), data.draw(st.integers(1, 4000))) for _ in range(count)]
    layout = layout_of(3, words=words, dtype=torch.float64)
    messages = [
        clear(layout, contribution(torch.tensor(numbers, dtype=torch.float64), samples=samples, whole=place))
        for place, (numbers, samples) in enumerate(members)
    ]
    mean, total = opened(layout, messages), sum(samples for _, samples in members)
    assert mean.samples == total
    for place in range(3):
        exact = sum(Fraction(numbers[place]) * samples for numbers, samples in members) / total
        bound = Fraction(count, 2 ** (words.fraction + 1)) / total
        assert abs(Fraction(float(mean.tensors["v"][place])) - exact) <= bound + Fraction(limit) / 2**51
    whole = round(Fraction(sum(place * samples for place, (_, samples) in enumerate(members)), total))
    assert mean.tensors["k"].tolist() == [whole, whole]


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("members", [3, 4, 7, 8, 16, 1000])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_sum_of_a_roster_does_not_overflow(bits, members, sign):
    samples = 2**20 if bits == 64 else 2**12
    words = Words(bits=bits, members=members, max_samples=samples)
    layout = layout_of(2, words=words)
    extreme = torch.full((2,), sign * LIMITS[bits])
    message = clear(
        layout, contribution(extreme, samples=samples, whole=int(sign) * 2**30, loss=sign * 2**13)
    )
    assert members * max(body(layout, message, 2)) < 2**bits
    longs = message[seal.SIZE : layout.head].view(LONG)
    assert members * int(longs.max()) < 2**64
    mean = opened(layout, [message] * members)
    assert mean.tensors["v"].tolist() == extreme.tolist()
    assert mean.tensors["k"].tolist() == [int(sign) * 2**30] * 2
    assert mean.metrics["loss"] == sign * 2**13


OUTSIDE = (float("nan"), float("inf"), float("-inf"), 1.0001, -1.0001, 1e6, -1e6, 1e35, -1e35)


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("value", OUTSIDE)
def test_what_is_out_of_range_is_refused_wherever_it_stands(bits, value):
    layout = layout_of(5, words=WORDS[bits])
    for place in range(5):
        values = torch.zeros(5)
        values[place] = value * LIMITS[bits]
        for samples in (1, 4000):
            with pytest.raises(MaskingError, match="or not finite"):
                clear(layout, contribution(values, samples=samples))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_as_they_were(dtype):
    layout = layout_of(4, words=WORDS[64], dtype=dtype)
    values = torch.tensor([0.5, -3.25, 100.0, -0.0078125], dtype=dtype)
    mean = opened(layout, [clear(layout, contribution(values, samples=7))] * 3)
    assert mean.tensors["v"].dtype == dtype
    assert mean.tensors["v"].tolist() == values.tolist()


@pytest.mark.parametrize("count", [1, 2**16 - 30, 2**16 + 5])
def test_no_tensor_is_too_long_or_too_short_for_chunks(count):
    layout = layout_of(count, words=WORDS[32])
    values = torch.linspace(-1, 1, count)
    mean = opened(layout, [clear(layout, contribution(values, samples=4000))])
    assert torch.allclose(mean.tensors["v"], values, atol=2.0**-24)


FORGED = {
    "too many samples": (0, 4000 * 3 + 1, "samples"),
    "no samples": (0, 0, "samples"),
    "too large a weight": (1, 4000 * 3 + 1, "samples"),
    "a metric": (2, 2**63, "metrics"),
    "a whole number": (3, 2**62, "whole numbers"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_sum_beyond_what_its_samples_allow_is_refused(what):
    """A member can tag what it likes; so the sum's range is looked at."""
    place, value, text = FORGED[what]
    layout = layout_of(3, words=WORDS[64])
    total = summed(layout, [clear(layout, contribution(torch.zeros(3), samples=100))] * 3)
    total[seal.SIZE : layout.head].view(LONG)[place] = value
    with pytest.raises(MaskingError, match=text):
        decoded(layout, total, members=3, booleans={})


@pytest.mark.parametrize("bits", [64, 32])
def test_a_number_of_a_sum_beyond_the_range_is_refused(bits):
    layout = layout_of(3, words=WORDS[bits])
    total = summed(layout, [clear(layout, contribution(torch.zeros(3), samples=100))] * 3)
    total[layout.head :].view(word_of(layout))[2] = 2 * WORDS[bits].offset(300) + 1
    with pytest.raises(MaskingError, match="'v' has words beyond"):
        decoded(layout, total, members=3, booleans={})
