"""Primitives and the key schedule, beside published vectors and slow oracles."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkl.masking import Call, sharing, stream
from fedkl.masking.canonical import canonical
from fedkl.masking.quorum import least_listed
from fedkl.masking.schedule import Context, Label, derive
from fedkl.masking.stream import MaskStream, Room


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 by hand."""
    key, block, found = hmac.digest(salt, secret, "sha256"), b"", b""
    while len(found) < length:
        block = hmac.digest(key, block + info + bytes([len(found) // 32 + 1]), "sha256")
        found += block
    return found[:length]


def test_hkdf_by_hand_gives_the_first_vector_of_rfc_5869():
    found = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert found.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


@pytest.mark.parametrize("length", [16, 32])
def test_keys_are_hkdf_with_this_protocols_salt(length):
    secret = secrets.token_bytes(32)
    info = canonical("tag.s", b"context", "h000", b"nonce")
    by_hand = hkdf(secret, b"fedkl-masking/1", info, length)
    assert derive(secret, Label.TAG_S, b"context", "h000", b"nonce", length=length) == by_hand


def test_no_two_labels_and_no_two_fields_give_the_same_key():
    secret = bytes(32)
    field_lists = [
        (),
        ("a",),
        ("a", "b"),
        ("ab",),
        (b"a",),
        (b"a", b"b"),
        (0,),
        (1,),
        ("a", ("b",)),
        (("a", "b"),),
    ]
    keys = [derive(secret, label, *each) for label in Label for each in field_lists]
    assert len(set(keys)) == len(keys) == len(Label) * len(field_lists)
    assert len({label.value for label in Label}) == len(Label) == 11


def test_every_field_of_a_context_changes_it():
    call = Call(run=bytes(16), round=0, attempt=0, cohort=("a", "b", "c"))
    context = Context(
        roster=bytes(32),
        layout=bytes(32),
        suite="s",
        mode="blind",
        call=call,
        model=bytes(32),
        transcript=bytes(32),
    )
    one = bytes(31) + b"\x01"
    calls = [{"run": one[16:]}, {"round": 1}, {"attempt": 1}, {"cohort": ("a", "b")}, {"cohort": ("ab", "c")}]
    others = [
        *[replace(context, **{name: one}) for name in ("roster", "layout", "model", "transcript")],
        replace(context, suite="t"),
        replace(context, mode="both"),
        *[replace(context, call=replace(call, **each)) for each in calls],
    ]
    assert len({each.digest for each in (context, *others)}) == len(others) + 1
    assert {field.name for field in fields(Context)} == {
        *("roster", "layout", "suite", "mode", "call", "model", "transcript")
    }


FIELD = st.recursive(
    st.binary(max_size=6) | st.text("ab\0é", max_size=4) | st.integers(-(2**100), 2**100),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


@given(st.tuples(FIELD, FIELD), st.tuples(FIELD, FIELD) | st.tuples(FIELD) | st.tuples(FIELD, FIELD, FIELD))
@settings(max_examples=300)
def test_canonical_bytes_are_the_same_only_for_the_same_fields(one, other):
    assert (canonical("x", *one) == canonical("x", *other)) == (one == other)
    assert canonical("x", *one) != canonical("y", *one)


def test_canonical_bytes_tell_where_fields_end():
    lists = [
        *[("ab",), ("a", "b"), (b"ab",), (("a", "b"),), ("a", ("b",)), ((), "ab"), ("ab", ())],
        *[("aS", "b"), ("a", "Sb"), (b"aB", b"b"), (b"a", b"Bb")],
        *[(1,), ("1",), (b"\x01",), (-1,), (256,), (0,), ("",), (b"",), ((),), (((),),)],
    ]
    found = [canonical("x", *each) for each in lists]
    assert all(one != other for one, other in combinations(found, 2))


def mask_bytes(seed: bytes, size: int) -> bytes:
    mask, room = MaskStream(seed), Room()
    steps = range(0, size, stream.CHUNK)
    return b"".join(mask.next(min(stream.CHUNK, size - begin), room).tobytes() for begin in steps)


def test_a_mask_is_the_key_stream_of_aes_gcm_over_zeros():
    seed, size = secrets.token_bytes(32), stream.CHUNK + 1000
    key = hkdf(seed, b"fedkl-masking/1", canonical("segment", 0), 32)
    assert mask_bytes(seed, size) == AESGCM(key).encrypt(bytes(12), bytes(size), None)[:-16]


def test_every_segment_has_a_key_of_its_own(monkeypatch):
    assert stream.SEGMENT == 2**24
    assert stream.SEGMENT % stream.CHUNK == 0
    monkeypatch.setattr(stream, "SEGMENT", 2 * stream.CHUNK)
    seed = secrets.token_bytes(32)
    found = mask_bytes(seed, 3 * stream.CHUNK)
    for number, begin in enumerate((0, 2 * stream.CHUNK)):
        key = hkdf(seed, b"fedkl-masking/1", canonical("segment", number), 32)
        zeros = bytes(min(len(found) - begin, 2 * stream.CHUNK))
        assert found[begin:][: len(zeros)] == AESGCM(key).encrypt(bytes(12), zeros, None)[:-16]


def lagrange(shares: dict[int, int]) -> int:
    """The constant of the polynomial through points: terms one by one, no caches."""
    p = 2**256 - 189
    total = 0
    for own, value in shares.items():
        term = value
        for other in shares:
            if other != own:
                term = term * -other * pow(own - other, p - 2, p) % p
        total += term
    return total % p


@pytest.mark.parametrize(("count", "threshold"), [(1, 1), (3, 3), (5, 4), (9, 2)])
def test_any_shares_up_to_the_threshold_give_the_secret_and_fewer_do_not(count, threshold):
    secret = secrets.token_bytes(31).rjust(32, b"\0")
    points = [3 * place + 1 for place in range(count)]
    shares = sharing.split(secret, points=points, threshold=threshold)
    for chosen in list(combinations(points, threshold))[:20]:
        picked = {point: shares[point] for point in chosen}
        assert sharing.join(picked) == secret
        numbers = {point: int.from_bytes(share, "big") for point, share in picked.items()}
        assert lagrange(numbers) == int.from_bytes(secret, "big")
    if threshold > 1:
        fewer = {point: shares[point] for point in points[: threshold - 1]}
        assert sharing.join(fewer) != secret
        assert sharing.split(secret, points=points, threshold=threshold) != shares


@given(secret=st.integers(0, 2**256 - 190), points=st.sets(st.integers(1, 1000), min_size=3, max_size=6))
@settings(max_examples=30)
def test_shares_of_any_number_come_together(secret, points):
    shares = sharing.split(secret.to_bytes(32, "big"), points=sorted(points), threshold=3)
    assert sharing.join(shares) == secret.to_bytes(32, "big")
    assert lagrange({point: int.from_bytes(share, "big") for point, share in shares.items()}) == secret


@pytest.mark.parametrize("count", range(3, 120))
def test_no_server_learns_a_sum_of_fewer_than_the_minimum(count):
    """|S| ≥ 2t − n, whatever lists it shows: see `least_listed`. Two lists share a third of the cohort."""
    cohort = [f"h{place:03}" for place in range(count)]
    for minimum in range(3, count + 1):
        least = least_listed(cohort, minimum=minimum)
        assert minimum <= 2 * least - count
        assert count < 3 * (2 * least - count)
        assert least <= count
        assert least_listed(cohort[:-1], minimum=count) == count - 1  # fewer than the minimum are asked


def test_masks_are_the_streams_of_numpys_words_on_any_machine():
    found = np.frombuffer(mask_bytes(bytes(32), 64), dtype="<u8")
    by_hand = AESGCM(hkdf(bytes(32), b"fedkl-masking/1", canonical("segment", 0), 32))
    key_stream = by_hand.encrypt(bytes(12), bytes(64), None)
    assert [int(word) for word in found] == [
        int.from_bytes(key_stream[place : place + 8], "little") for place in range(0, 64, 8)
    ]
