"""The roster: who the members are, and the rules that they agreed on without the server."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cached_property
from typing import get_args

from fedkl.errors import MaskingError, gathered, shown
from fedkl.masking.canonical import PROTOCOL, Field, canonical, digest
from fedkl.masking.cards import CARD_DAYS, MemberCard, MemberKeys, date_problem
from fedkl.masking.schedule import Label, Mode, Secret, derive
from fedkl.masking.words import MAX_MEMBERS, MAX_SAMPLES, WordBits, Words

ROSTER_DAYS = 90
"""After so many days a roster is refused; one that claims more as well."""

LEAST_MEMBERS = 3
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's: no I, L, O, U to be misheard or misread
_GROUPS, _GROUP = 5, 4


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What members agree on beside who they are.

    Attributes:
        mode: Which masks.
        bits: Of a word: 64, or 32 for large models.
        minimum: Fewest members in a sum, at least 3.
        max_samples: Most samples of one update, at most 2^20.
        sampled: Whether a round may ask only some of the members. Changing cohorts can give numbers of
            samples away, and with pair masks the difference of sums.
        server_model: Whether the server may change the model between rounds, e.g. by an optimizer of its own.
            Otherwise members take the sum and nothing else. Not with blind masks.

    Raises:
        MaskingError: A field is out of range, or two do not go together.
    """

    mode: Mode = "blind"
    bits: WordBits = 64
    minimum: int = LEAST_MEMBERS
    max_samples: int = MAX_SAMPLES
    sampled: bool = False
    server_model: bool = False

    def __post_init__(self) -> None:
        checks = {
            f"mode: expected one of {', '.join(get_args(Mode))}, got {shown(self.mode)}": (
                self.mode in get_args(Mode)
            ),
            f"bits: expected 64 or 32, got {shown(self.bits)}": self.bits in get_args(WordBits),
            f"minimum: expected {LEAST_MEMBERS} to {MAX_MEMBERS}, got {shown(self.minimum)}": (
                LEAST_MEMBERS <= self.minimum <= MAX_MEMBERS
            ),
            f"max_samples: expected 1 to {MAX_SAMPLES}, got {shown(self.max_samples)}": (
                1 <= self.max_samples <= MAX_SAMPLES
            ),
            "server_model: a server that cannot read the sum cannot change the model; take mode 'pairwise'": (
                not self.server_model or self.mode == "pairwise"
            ),
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise MaskingError(gathered("Rules of a cohort refused.", problems, "Correct these."))

    def fields(self) -> tuple[str | int, ...]:
        """All that a roster's digest covers."""
        numbers = (self.bits, self.minimum, self.max_samples, self.sampled, self.server_model)
        return (self.mode, *numbers)


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Who the members are.

    Attributes:
        name: Of the cohort, as a person would say it.
        epoch: From 0; every change is one more.
        previous: Digest of the roster before; empty for the first.
        cards: Of the members, sorted by name.
        rules: What they agreed on.
        expires: The last day on which it is good.
        commitment: To the cohort's key, 32 bytes.

    Raises:
        MaskingError: Its name does not fit a line, or members are repeated, unsorted, too few or too many.
    """

    name: str
    epoch: int
    previous: bytes = field(repr=False)
    cards: tuple[MemberCard, ...] = field(repr=False)
    rules: Rules
    expires: date
    commitment: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isprintable() and 1 <= len(self.name) <= 100):
            raise MaskingError(
                f"Roster refused: name {shown(self.name)}: expected 1 to 100 printable characters."
            )
        names = [card.name for card in self.cards]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise MaskingError(f"Roster refused: {repeated[0]} is on it twice. Give every member one card.")
        if names != sorted(names):
            raise MaskingError("Roster refused: expected the members sorted by name.")
        least = self.rules.minimum
        if not least <= len(names) <= MAX_MEMBERS:
            raise MaskingError(
                f"Roster refused: expected {least} (the minimum) to {MAX_MEMBERS} members, got {len(names)}."
            )

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(card.name for card in self.cards)

    @cached_property
    def card_of(self) -> Mapping[str, MemberCard]:
        """Cards by name."""
        return {card.name: card for card in self.cards}

    @property
    def suite(self) -> str:
        """The primitives and the words that are used."""
        return (
            f"{PROTOCOL} X25519 MLKEM768-X25519 HKDF-SHA256 AES-256-GCM AES-256-CTR Poly1305 Ed25519 "
            f"words-{self.rules.bits}"
        )

    @property
    def words(self) -> Words:
        """How numbers become words."""
        rules = self.rules
        return Words(bits=rules.bits, members=len(self.cards), max_samples=rules.max_samples)

    @cached_property
    def digest(self) -> bytes:
        """Of everything, 32 bytes."""
        return digest("roster", *self._fields())

    def _fields(self) -> tuple[Field, ...]:
        cards = [card.fields() for card in self.cards]
        about = (self.name, self.epoch, self.previous, self.rules.fields(), self.expires.isoformat())
        return (*about, self.commitment, self.suite, cards)

    @property
    def fingerprint(self) -> str:
        """100 bits of the digest, to be compared by phone: five groups of four letters and digits."""
        number = int.from_bytes(self.digest[:13], "big") >> 4
        letters = [_ALPHABET[number >> (5 * place) & 31] for place in reversed(range(_GROUPS * _GROUP))]
        groups = ["".join(letters[k : k + _GROUP]) for k in range(0, len(letters), _GROUP)]
        return " ".join(groups)

    def check_date(self, today: date) -> None:
        """Checks that roster and cards are good on a day.

        Raises:
            MaskingError: One has expired, or claims a longer life than is allowed.
        """
        dates = [("the roster", self.expires, ROSTER_DAYS)]
        dates += [(f"{card.name}'s card", card.expires, CARD_DAYS) for card in self.cards]
        found = [(what, date_problem(day, today=today, days=days)) for what, day, days in dates]
        problems = [f"{what} {problem}" for what, problem in found if problem]
        if problems:
            remedy = (
                "If that is not today's date, set this machine's clock. Otherwise run `fedkl cohort "
                "change`, with new cards where they are needed."
            )
            raise MaskingError(gathered(f"Cohort {self.name} is not good on {today}.", problems, remedy))


@dataclass(frozen=True, kw_only=True)
class SealedRoster:
    """A roster as it is handed around: with the cohort's key wrapped for each member.

    Attributes:
        roster: The roster.
        wrapped: The cohort's key by member, each for that member only.
        signer: Who made it; on the roster before, if there was one.
        signature: Of the roster's digest.
    """

    roster: Roster
    wrapped: Mapping[str, bytes] = field(repr=False)
    signer: str
    signature: bytes = field(repr=False)

    def opened(self, keys: MemberKeys) -> Membership:
        """The cohort's key, for one of its members.

        Raises:
            MaskingError: These are not a member's keys, or the wrapped key is not the one that the roster
                names.
        """
        roster = self.roster
        card = roster.card_of.get(keys.name)
        if card is None:
            raise MaskingError(
                f"{keys.name} is not a member of cohort {roster.name}: its members are "
                f"{', '.join(roster.members)}."
            )
        if card != keys.card():
            raise MaskingError(
                f"Cohort {roster.name} has another card of {keys.name} than these keys make. Send the card "
                "again and have it changed; if you did send this one, somebody exchanged it."
            )
        secret = keys.unwrap(self.wrapped.get(keys.name, b""), info=roster.digest)
        return Membership(roster=roster, keys=keys, secret=secret)

    def check_follows(self, before: Roster) -> None:
        """Checks that a member of the roster before has changed it.

        Raises:
            MaskingError: It is of another cohort or epoch, or not signed by one of the members before.
        """
        roster = self.roster
        if (roster.name, roster.epoch, roster.previous) != (before.name, before.epoch + 1, before.digest):
            raise MaskingError(
                f"Cohort {roster.name}, epoch {roster.epoch}, does not follow epoch {before.epoch} of "
                f"{before.name}, which is joined here. Join the epochs in between first."
            )
        if not self.signed_by_one_of(before):
            raise MaskingError(
                f"Cohort {roster.name}, epoch {roster.epoch}: not signed by a member of the epoch before."
            )

    def signed_by_one_of(self, roster: Roster) -> bool:
        """Whether the member who is named as signer is on a roster, and has signed this one."""
        card = roster.card_of.get(self.signer)
        return card is not None and card.verify(self.signature, _signed(self.roster))


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What a member holds of its cohort.

    Attributes:
        roster: The roster.
        keys: The member's own.
        secret: The cohort's key, K in docs/masked.md, 32 bytes.

    Raises:
        MaskingError: The secret is not the one that the roster is committed to.
    """

    roster: Roster
    keys: MemberKeys = field(repr=False)
    secret: Secret = field(repr=False)

    def __post_init__(self) -> None:
        if not hmac.compare_digest(committed(self.secret), self.roster.commitment):
            raise MaskingError(
                f"Cohort {self.roster.name}: the key that came is not the one that the roster names. "
                "Somebody exchanged it: ask for the cohort's file again, and compare the fingerprint."
            )

    @property
    def name(self) -> str:
        """The member's."""
        return self.keys.name


def committed(secret: Secret) -> bytes:
    """The commitment to a cohort's key."""
    return derive(secret.reveal(), Label.COMMITMENT)


def new_roster(
    *,
    name: str,
    cards: Sequence[MemberCard],
    rules: Rules,
    signer: MemberKeys,
    today: date,
    previous: Roster | None = None,
    secret: Secret | None = None,
) -> SealedRoster:
    """Makes a roster, with a new cohort key.

    Args:
        name: Of the cohort.
        cards: Of all members, in any order.
        rules: What they agreed on.
        signer: Keys of the member who makes it.
        today: The date.
        previous: The roster that is changed.
        secret: A cohort key that was kept, to make the same roster again; None: a new one.

    Raises:
        MaskingError: The cards do not make a roster, one has expired or has a key that cannot be used, or the
            signer is no member.
    """
    secret = secret or Secret(secrets.token_bytes(32))
    roster = Roster(
        name=name,
        epoch=0 if previous is None else previous.epoch + 1,
        previous=b"" if previous is None else previous.digest,
        cards=tuple(sorted(cards, key=lambda card: card.name)),
        rules=rules,
        expires=today + timedelta(days=ROSTER_DAYS),
        commitment=committed(secret),
    )
    roster.check_date(today)
    entitled = roster if previous is None else previous
    if entitled.card_of.get(signer.name) != signer.card():
        raise MaskingError(f"{signer.name} is not a member of cohort {name}, and cannot make its roster.")
    for card in roster.cards:
        signer.exchanged(card)  # refuses points of small order
    wrapped = {card.name: card.wrap(secret, info=roster.digest) for card in roster.cards}
    signature = signer.sign(_signed(roster))
    return SealedRoster(roster=roster, wrapped=wrapped, signer=signer.name, signature=signature)


def _signed(roster: Roster) -> bytes:
    return canonical("roster.signature", roster.digest)
