"""Cards and rosters: who is let in, and who could be exchanged."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta

import pytest

from fedkl.errors import MaskingError
from fedkl.masking import MemberCard, MemberKeys, Membership, Rules, new_roster
from fedkl.masking.canonical import canonical
from fedkl.masking.schedule import Secret
from tests.masking.cohorts import TODAY, keys_of, new_cohort

LARGE = b"\xff" * 1184  # coefficients above q: no ML-KEM key
SMALL_ORDER = (
    bytes(32),
    bytes([1]) + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
)


def card_with(keys: MemberKeys, **changed: bytes) -> MemberCard:
    """A card that its owner made wrong on purpose: the signature fits."""
    parts = ("identity", "pair", "receive_lattice", "receive_curve")
    card = keys.card()
    new = {part: getattr(card, part) for part in parts} | changed
    signed = canonical("card", card.name, card.expires.isoformat(), *new.values())
    return MemberCard(name=card.name, expires=card.expires, signature=keys.sign(signed), **new)


def card_until(keys: MemberKeys, expires: date) -> MemberCard:
    """A card with another last day, whose signature fits."""
    seeds = dict(keys.seeds)
    return MemberKeys(name=keys.name, expires=expires, seeds=seeds).card()


@pytest.mark.parametrize("point", SMALL_ORDER, ids=lambda point: point.hex()[:8])
@pytest.mark.parametrize("part", ["pair", "receive_curve"])
def test_a_card_with_a_point_of_small_order_makes_no_roster(part, point):
    keys = keys_of(3)
    cards = [keys[0].card(), keys[1].card(), card_with(keys[2], **{part: point})]
    with pytest.raises(MaskingError, match="Card of h002: its key cannot be used"):
        new_roster(name="study", cards=cards, rules=Rules(), signer=keys[0], today=TODAY)


def test_a_card_whose_lattice_key_is_none_makes_no_roster():
    keys = keys_of(3)
    cards = [keys[0].card(), keys[1].card(), card_with(keys[2], receive_lattice=LARGE)]
    with pytest.raises(MaskingError, match="Card of h002: its key cannot be used"):
        new_roster(name="study", cards=cards, rules=Rules(), signer=keys[0], today=TODAY)


@pytest.mark.parametrize("part", ["identity", "pair", "receive_lattice", "receive_curve", "signature"])
def test_an_altered_card_is_refused(part):
    card = keys_of(3)[0].card()
    for place in (0, -1):
        changed = bytearray(getattr(card, part))
        changed[place] ^= 1
        with pytest.raises(MaskingError, match="signature does not fit"):
            replace(card, **{part: bytes(changed)})
    with pytest.raises(MaskingError, match=f"{part} has a wrong length"):
        replace(card, **{part: getattr(card, part)[:-1]})
    with pytest.raises(MaskingError, match="signature does not fit"):
        replace(card, expires=card.expires + timedelta(days=1))
    with pytest.raises(MaskingError, match="signature does not fit"):
        replace(card, name="another")


@pytest.mark.parametrize("name", ["a\nb", "", "x" * 101, "a\x1b[2J"])
def test_a_name_of_a_cohort_that_would_break_a_line_is_refused(name):
    keys = keys_of(3)
    with pytest.raises(MaskingError, match="printable"):
        new_roster(name=name, cards=[k.card() for k in keys], rules=Rules(), signer=keys[0], today=TODAY)


def test_a_key_that_somebody_else_wrapped_is_noticed():
    """HPKE's base mode says nothing of who wrapped; the commitment on the roster does."""
    cohort = new_cohort(3)
    roster, keys = cohort.sealed.roster, cohort.keys[1]
    false = keys.card().wrap(Secret(bytes(32)), info=roster.digest)
    exchanged = replace(cohort.sealed, wrapped={**cohort.sealed.wrapped, keys.name: false})
    with pytest.raises(MaskingError, match="Somebody exchanged it"):
        exchanged.opened(keys)
    with pytest.raises(MaskingError, match="Somebody exchanged it"):
        Membership(roster=roster, keys=keys, secret=Secret(bytes(32)))


def test_a_wrapped_key_is_bound_to_its_roster_and_to_its_receiver():
    cohort = new_cohort(3)
    keys, wrapped = cohort.keys[0], cohort.sealed.wrapped
    longer = replace(cohort.sealed.roster, expires=TODAY + timedelta(days=1000))
    altered = [
        replace(cohort.sealed, wrapped={**wrapped, "h000": wrapped["h001"]}),
        replace(cohort.sealed, roster=longer),
        *[replace(cohort.sealed, wrapped={"h000": cut}) for cut in (b"", b"x", bytes(1168))],
        replace(cohort.sealed, wrapped={}),
    ]
    for sealed in altered:
        with pytest.raises(MaskingError, match="not wrapped for"):
            sealed.opened(keys)


def test_keys_that_are_not_those_of_the_roster_open_nothing():
    cohort = new_cohort(3)
    with pytest.raises(MaskingError, match="not a member"):
        cohort.sealed.opened(MemberKeys.new("stranger", today=TODAY))
    with pytest.raises(MaskingError, match="another card of h000"):
        cohort.sealed.opened(MemberKeys.new("h000", today=TODAY))


def test_every_field_of_a_roster_changes_its_digest_and_its_fingerprint():
    roster = new_cohort(3).sealed.roster
    rules = (
        Rules(mode="both"),
        Rules(mode="pairwise"),
        Rules(mode="pairwise", server_model=True),
        Rules(bits=32),
        Rules(sampled=True),
        Rules(max_samples=5),
    )
    others = [
        replace(roster, name="other"),
        replace(roster, epoch=1),
        replace(roster, previous=bytes(32)),
        replace(roster, cards=tuple(each.card() for each in keys_of(4)[:3])),
        replace(roster, cards=(*roster.cards, keys_of(4)[3].card())),
        replace(roster, expires=roster.expires + timedelta(days=1)),
        replace(roster, commitment=bytes(32)),
        *[replace(roster, rules=each) for each in rules],
        replace(replace(roster, cards=(*roster.cards, keys_of(4)[3].card())), rules=Rules(minimum=4)),
    ]
    assert len({each.digest for each in (roster, *others)}) == len(others) + 1
    assert len({each.fingerprint for each in (roster, *others)}) == len(others) + 1
    assert [len(group) for group in roster.fingerprint.split(" ")] == [4] * 5


def test_a_fingerprint_is_100_bits_of_the_digest():
    roster = new_cohort(3).sealed.roster
    letters = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    bits = "".join(f"{letters.index(letter):05b}" for letter in roster.fingerprint.replace(" ", ""))
    assert bits == f"{int.from_bytes(roster.digest, 'big'):0256b}"[:100]


def test_a_later_roster_is_signed_by_a_member_of_the_one_before():
    cohort = new_cohort(4)
    before = cohort.sealed.roster
    cards = [each.card() for each in cohort.keys]
    common = {"name": "study", "rules": Rules(), "today": TODAY}
    after = new_roster(cards=cards[:3], signer=cohort.keys[3], previous=before, **common)
    after.check_follows(before)
    for altered in (
        replace(after, signer="h000"),
        replace(after, signer="stranger"),
        replace(after, signature=bytes(64)),
        replace(after, roster=replace(after.roster, commitment=bytes(32))),
    ):
        with pytest.raises(MaskingError, match="not signed by a member of the epoch before"):
            altered.check_follows(before)
    stranger = MemberKeys.new("stranger", today=TODAY)
    with pytest.raises(MaskingError, match="cannot make its roster"):
        new_roster(cards=[*cards, stranger.card()], signer=stranger, previous=before, **common)
    enlarged = new_roster(cards=[*cards, stranger.card()], signer=cohort.keys[0], previous=before, **common)
    signature = stranger.sign(canonical("roster.signature", enlarged.roster.digest))
    with pytest.raises(MaskingError, match="not signed by a member of the epoch before"):
        replace(enlarged, signer="stranger", signature=signature).check_follows(before)
    for fields in ({"epoch": 2}, {"previous": bytes(32)}, {"name": "other"}):
        with pytest.raises(MaskingError, match="does not follow"):
            replace(after, roster=replace(after.roster, **fields)).check_follows(before)
    assert (
        after.opened(cohort.keys[0]).secret.reveal() != cohort.sealed.opened(cohort.keys[0]).secret.reveal()
    )


def test_what_is_good_today_and_not_tomorrow():
    roster = new_cohort(3).sealed.roster
    roster.check_date(roster.expires)
    with pytest.raises(MaskingError, match="the roster expired"):
        roster.check_date(roster.expires + timedelta(days=1))
    keys = [MemberKeys.new(f"h{place}", today=TODAY - timedelta(days=365 - place)) for place in range(3)]
    cards = tuple(each.card() for each in keys)
    old = replace(roster, cards=cards)
    old.check_date(TODAY)
    tomorrow = TODAY + timedelta(days=1)
    with pytest.raises(MaskingError, match="h0's card expired"):
        old.check_date(tomorrow)
    with pytest.raises(MaskingError, match="h0's card expired"):
        new_roster(name="study", cards=cards, rules=Rules(), signer=keys[0], today=tomorrow)


def test_nobody_gives_a_card_or_a_roster_a_longer_life_than_the_protocol():
    """Whoever makes one writes its last day into it, and signs it."""
    keys = keys_of(3)
    roster = new_cohort(3).sealed.roster
    day = timedelta(days=1)  # a clock may be ahead by one
    replace(roster, expires=TODAY + timedelta(days=90) + day).check_date(TODAY)
    with pytest.raises(MaskingError, match="the roster claims to be good until 2027-03-01, longer"):
        replace(roster, expires=TODAY + timedelta(days=90) + 2 * day).check_date(TODAY)
    lasting = [card_until(each, date.max) for each in keys]
    with pytest.raises(MaskingError, match="h001's card claims to be good until 9999-12-31"):
        replace(roster, cards=(keys[0].card(), lasting[1], keys[2].card())).check_date(TODAY)
    with pytest.raises(MaskingError, match="h000's card claims"):
        new_roster(name="study", cards=lasting, rules=Rules(), signer=keys[0], today=TODAY)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"minimum": 2}, "minimum"),
        ({"max_samples": 2**20 + 1}, "max_samples"),
        ({"max_samples": 0}, "max_samples"),
        ({"server_model": True}, "server_model"),
        ({"server_model": True, "mode": "both"}, "server_model"),
    ],
)
def test_rules_that_protect_nothing_are_refused(rules, text):
    with pytest.raises(MaskingError, match=text):
        Rules(**rules)


def test_a_roster_has_each_member_once_in_order_and_enough_of_them():
    cards = tuple(each.card() for each in keys_of(3))
    roster = new_cohort(3).sealed.roster
    with pytest.raises(MaskingError, match="twice"):
        replace(roster, cards=(*cards, cards[-1]))
    with pytest.raises(MaskingError, match="sorted"):
        replace(roster, cards=cards[::-1])
    with pytest.raises(MaskingError, match="expected 3"):
        replace(roster, cards=cards[:2])
