"""Every key beside the table of docs/masked.md, derived by hand; and what opens nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedkl.errors import MaskingError
from fedkl.masking import Layout, Member, Words, seal, sharing
from fedkl.masking.canonical import canonical
from fedkl.masking.encoding import Bytes, Masks, decoded, encoded, unmasked
from fedkl.masking.keyring import self_commitment, self_mask
from fedkl.masking.roster import committed
from fedkl.masking.schedule import Context, Label
from fedkl.masking.stream import CHUNK, MaskStream, Room
from fedkl.update import TensorSpec
from tests.masking.cohorts import RUN, Cohort, drawn, new_cohort
from tests.masking.test_attacks import no_masks
from tests.masking.test_vectors import hkdf

NONCE = bytes(range(32))
DOCUMENT = Path(__file__).parents[2] / "docs" / "masked.md"


def by_hand(secret: bytes, label: str, *fields: object, length: int = 32) -> bytes:
    return hkdf(secret, b"fedkl-masking/1", canonical(label, *fields), length)  # type: ignore[arg-type]


def start(mask: MaskStream) -> bytes:
    return mask.next(64, Room()).tobytes()


def context_of(member: Member, cohort: Cohort, **call: int) -> Context:
    return member._current(cohort.call(**call), member.memory.runs[RUN.hex()])


def exchanged(cohort: Cohort, own: int, other: int) -> bytes:
    """X25519 between two members, as whoever breaks it has it."""
    private = X25519PrivateKey.from_private_bytes(cohort.keys[own].seeds["pair"].reveal())
    return private.exchange(X25519PublicKey.from_public_bytes(cohort.keys[other].card().pair))


def pair_of(cohort: Cohort, own: int, other: int, *, key: bytes) -> bytes:
    """The secret of a pair, from X25519 and a cohort's key."""
    names = sorted((cohort.names[own], cohort.names[other]))
    return by_hand(exchanged(cohort, own, other) + key, "pair", cohort.sealed.roster.digest, names)


def test_the_documents_table_has_every_label():
    text = DOCUMENT.read_text(encoding="utf-8").partition("### Keys")[2].partition("### Upload")[0]
    assert re.findall(r"^\| `([a-z.]+)` \|", text, re.MULTILINE) == [label.value for label in Label]


def test_every_key_is_that_of_the_documents_table():
    cohort = new_cohort(3, mode="both")
    member, secret = cohort.members["h000"], cohort.sealed.opened(cohort.keys[0]).secret
    ring, context, key = member._keyring, context_of(member, cohort), secret.reveal()
    digest, own = context.digest, cohort.keys[0].own_secret.reveal()
    assert committed(secret) == by_hand(key, "commitment") == cohort.sealed.roster.commitment
    tag = by_hand(key, "tag.r", digest, length=16), by_hand(key, "tag.s", digest, "h000", NONCE)
    assert ring.tag_key(context, "h000", NONCE) == tag
    blind = by_hand(key, "blind.mask", digest, "h000", NONCE)
    assert start(ring.blind_mask(context, "h000", NONCE)) == start(MaskStream(blind))
    seed = by_hand(own, "self", digest, NONCE)
    assert ring.self_seed(context, NONCE) == seed
    assert start(self_mask(seed)) == start(MaskStream(by_hand(seed, "self.mask")))
    assert self_commitment(seed) == by_hand(seed, "self.commitment")
    for other in (1, 2):
        pair = pair_of(cohort, 0, other, key=key)
        assert ring.pair_seed(context, cohort.names[other]) == by_hand(pair, "pair.mask", digest)
    found = {}
    for place, (holder, encrypted) in enumerate(ring.shares(context, NONCE).items()):
        pair = pair_of(cohort, 0, place, key=key) if place else own
        share_key = by_hand(pair, "pair.share", digest, "h000", holder, NONCE)
        about = canonical("share", "h000", holder)
        found[place + 1] = AESGCM(share_key).decrypt(bytes(12), encrypted, about)
    assert sharing.join(found) == seed  # 3 of 3; any two of them give something else
    assert all(sharing.join(dict(two)) != seed for two in combinations(found.items(), 2))


@pytest.mark.parametrize("mode", ["blind", "pairwise", "both"])
def test_masks_are_those_of_the_mode(mode):
    cohort = new_cohort(3, mode=mode)
    member = cohort.members["h001"]
    ring, context = member._keyring, context_of(member, cohort)
    blind, own = ring.blind_mask(context, "h001", NONCE), self_mask(ring.self_seed(context, NONCE))
    pairs = {name: MaskStream(ring.pair_seed(context, name)) for name in ("h000", "h002")}
    plus = [*([blind] if mode != "pairwise" else []), *([own, pairs["h002"]] if mode != "blind" else [])]
    minus = [pairs["h000"]] if mode != "blind" else []
    masks = ring.masks(context, NONCE)
    assert [start(mask) for mask in masks.plus] == [start(mask) for mask in plus]
    assert [start(mask) for mask in masks.minus] == [start(mask) for mask in minus]


def test_a_share_opens_for_its_own_place_only():
    cohort = new_cohort(3, mode="both")
    rings = {name: member._keyring for name, member in cohort.members.items()}
    context = context_of(cohort.members["h000"], cohort)
    later = context_of(cohort.members["h000"], cohort, round=1)
    share = rings["h000"].shares(context, NONCE)["h001"]
    rings["h001"].opened_share(context, "h000", NONCE, share)
    for ring, where, owner, nonce in (
        (rings["h002"], context, "h000", NONCE),
        (rings["h001"], later, "h000", NONCE),
        (rings["h001"], context, "h002", NONCE),
        (rings["h001"], context, "h000", bytes(32)),
        (rings["h000"], context, "h001", NONCE),  # sent back: the pair has one secret
    ):
        with pytest.raises(MaskingError, match="seed was altered"):
            ring.opened_share(where, owner, nonce, share)


def test_a_layout_of_other_names_shapes_or_kinds_has_another_digest():
    specs = {"a": TensorSpec(shape=(2, 3), dtype=torch.float32), "b": TensorSpec(shape=(), dtype=torch.int64)}
    layout = Layout(specs=specs, words=Words(bits=64, members=3, max_samples=9), metrics=("loss",))
    others = [
        {**specs, "a": TensorSpec(shape=(3, 2), dtype=torch.float32)},
        {**specs, "a": TensorSpec(shape=(2, 3), dtype=torch.float16)},
        {**specs, "b": TensorSpec(shape=(), dtype=torch.int32)},
        {"b": specs["b"], "a": specs["a"]},
        {"a": specs["a"], "c": specs["b"]},
    ]
    words = [
        Words(bits=32, members=3, max_samples=9),
        Words(bits=64, members=4, max_samples=9),
        Words(bits=64, members=3, max_samples=8),
    ]
    found = [layout, replace(layout, metrics=("more",)), replace(layout, metrics=())]
    found += [replace(layout, specs=each) for each in others] + [
        replace(layout, words=each) for each in words
    ]
    assert len({each.digest for each in found}) == len(found)


def read(cohort: Cohort, words: Bytes, *, key: bytes) -> bool:
    """Whether h000's upload is read with broken X25519, its own mask and this key of the cohort."""
    member, words = cohort.members["h000"], words.copy()
    context = context_of(member, cohort)
    nonce = bytes.fromhex(member.memory.runs[RUN.hex()].uploads[context.digest.hex()])
    seeds = [by_hand(pair_of(cohort, 0, other, key=key), "pair.mask", context.digest) for other in (1, 2)]
    masks = [self_mask(member._keyring.self_seed(context, nonce)), *map(MaskStream, seeds)]
    unmasked(cohort.layout, words, masks=Masks(minus=masks))
    try:
        mean = decoded(cohort.layout, words, members=1, booleans=drawn(0))
    except MaskingError:
        return False
    return torch.allclose(mean.tensors["weight"], cohort.updates["h000"].tensors["weight"], atol=1e-5)


def test_recorded_traffic_does_not_open_by_breaking_x25519_alone():
    cohort = new_cohort(3, mode="pairwise")
    upload = cohort.uploads(cohort.call())["h000"]
    assert not any(read(cohort, upload.words, key=guess) for guess in (b"", bytes(32)))
    assert read(cohort, upload.words, key=cohort.sealed.opened(cohort.keys[0]).secret.reveal())


def test_a_member_who_works_with_the_server_cannot_test_guesses_of_an_upload(monkeypatch):
    """It has r and s of every upload; the tag of one must be masked like its words."""

    def guessed() -> bool:
        cohort = new_cohort(3, mode="both")
        upload = cohort.uploads(cohort.call())["h000"]
        colluder = cohort.members["h002"]
        context, ring = context_of(colluder, cohort), colluder._keyring
        key = ring.tag_key(context, "h000", upload.nonce)
        guess = encoded(cohort.layout, cohort.updates["h000"], masks=Masks(), tag_key=key)[: seal.SIZE]
        known = [ring.blind_mask(context, "h000", upload.nonce), MaskStream(ring.pair_seed(context, "h000"))]
        tag, room = upload.words[: seal.SIZE].tobytes(), Room()
        options = {tag}
        for mask in known:
            noise = mask.next(CHUNK, room)[: seal.SIZE].tobytes()
            options |= {seal.added(each, -seal.number(noise)) for each in options}
        return guess.tobytes() in options

    assert not guessed()
    no_masks(monkeypatch)
    assert guessed()
