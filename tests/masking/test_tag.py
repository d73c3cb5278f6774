"""The tag of a sum says no more than the sum; beside a slow Poly1305."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import torch

from fedkl.masking import Contribution, Layout, Words, seal
from fedkl.masking.encoding import Masks, encoded
from fedkl.update import TensorSpec

P = 2**130 - 5


def slow(r: bytes, message: bytes) -> int:
    """Poly1305's polynomial as RFC 8439 writes it down."""
    point = int.from_bytes(r, "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    value = 0
    for begin in range(0, len(message), 16):
        block = message[begin : begin + 16]
        value = (value + int.from_bytes(block, "little") + (1 << (8 * len(block)))) * point % P
    return value


def test_the_slow_polynomial_gives_the_tag_of_rfc_8439():
    key = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
    tag = (slow(key[:16], b"Cryptographic Forum Research Group") + seal.number(key[16:])) % 2**128
    assert tag.to_bytes(16, "little") == bytes.fromhex("a8061dc1305136c6c22b8baf0c0127a9")


@pytest.mark.parametrize("blocks", [1, 2, 3, 50])
def test_the_polynomial_is_whole(blocks):
    tops = set()
    for _ in range(40):
        r, message = secrets.token_bytes(16), secrets.token_bytes(16 * blocks)
        polynomial = seal.Polynomial(r)
        for begin in range(0, len(message), 32):
            polynomial.update(memoryview(message)[begin : begin + 32])
        found = polynomial.value()
        assert found == slow(r, message)
        tops.add(found >> 128)
    assert len(tops) > 1  # else bits above the 128th were not tried; 1 of 4 each: < 1e-23


@pytest.mark.parametrize("point", [0, 4, 5, 1000])
def test_the_smallest_points_are_no_exception(point):
    r = point.to_bytes(16, "little")
    polynomial = seal.Polynomial(r)
    polynomial.update(memoryview(bytes(range(32))))
    assert polynomial.value() == slow(r, bytes(range(32)))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_tags_of_sums_add_up(count):
    for _ in range(20):
        r, blocks = secrets.token_bytes(16), 9
        messages = np.frombuffer(secrets.token_bytes(16 * blocks * count), "<u8").reshape(count, -1) >> 4
        pads = [secrets.token_bytes(32) for _ in range(count)]
        total = bytes(32)
        for message, pad in zip(messages, pads, strict=True):
            total = seal.added(total, slow(r, message.tobytes()) + seal.number(pad))
        summed = messages.sum(axis=0, dtype="<u8").tobytes()
        fits = {"pads": pads, "own": slow(r, summed), "r": r, "blocks": blocks}
        assert seal.holds(total=total, **fits)
        assert seal.number(total) < P
        assert not seal.holds(total=seal.added(total, 1), **fits)
        assert not seal.holds(total=seal.added(total, 2**128), **fits)
        assert not seal.holds(total=total, **fits | {"pads": pads[:-1]})
        assert not seal.holds(total=total, **fits | {"pads": [*pads, secrets.token_bytes(32)]})
        assert count == 1 or not seal.holds(total=total, **fits | {"blocks": blocks + 1})


def test_the_sum_of_tags_does_not_tell_whose_update_is_whose():
    """A member works with the server: it has r and every s, and the sum of two others.

    It guesses which of the two gave what. Both guesses must give the same sum of tags.
    """
    specs = {"v": TensorSpec(shape=(6,), dtype=torch.float32)}
    layout = Layout(specs=specs, words=Words(bits=64, members=3, max_samples=100))
    generator = torch.Generator().manual_seed(1)
    guesses = [
        Contribution(tensors={"v": torch.randn(6, generator=generator)}, samples=samples)
        for samples in (30, 40)
    ]
    for _ in range(20):
        r, pads = secrets.token_bytes(16), [secrets.token_bytes(32) for _ in range(2)]
        sums = []
        for one, other in (guesses, guesses[::-1]):
            messages = [
                encoded(layout, given, masks=Masks(), tag_key=(r, pad))
                for given, pad in ((one, pads[0]), (other, pads[1]))
            ]
            sums.append(seal.added(messages[0][:32].tobytes(), seal.number(messages[1][:32].tobytes())))
        assert sums[0] == sums[1]
