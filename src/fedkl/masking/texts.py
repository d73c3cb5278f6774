"""Cards and rosters as text: the JSON files that members send around.

What is read was written by somebody else, and may have gone through a server's hands. So every field is
checked before it is used, none may be missing or unknown, and a text is refused that is not exactly what
would be written for what it says (line ends, which mail programs change, excepted).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedkl.errors import MaskingError, shown
from fedkl.formats import check_version
from fedkl.lockfile import MAGIC
from fedkl.masking.cards import MemberCard
from fedkl.masking.fields import Fields
from fedkl.masking.roster import Roster, Rules, SealedRoster
from fedkl.masking.schedule import Mode
from fedkl.masking.words import MAX_MEMBERS, WordBits
from fedkl.parsing import parse_json_object

CARD, COHORT = "fedkl member card", "fedkl cohort"
VERSION = 1
MAX_CARD, MAX_COHORT = 2**14, 2**23
"""Most bytes of a text; a card has 2 KiB, a cohort of 1,000 members less than 4 MiB."""

MAX_EPOCH = 10**6

_WRAPPED = 1168
_COHORT_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 ._-]{0,62}[A-Za-z0-9_-])?")
_KINDS = {CARD: "a member's card (.member)", COHORT: "a cohort's file (.cohort)"}
_REMEDIES = {
    CARD: "Ask the member for its card, NAME.member, again.",
    COHORT: "Ask for the cohort's file, NAME.cohort, again.",
}
_T = TypeVar("_T")


def card_to_bytes(card: MemberCard) -> bytes:
    """A card as it is sent around."""
    return _text({"format": CARD, "version": VERSION, **card_values(card)})


def card_from_bytes(data: bytes, *, source: object = "Card") -> MemberCard:
    """Reads what `card_to_bytes` wrote. Its date is not looked at.

    Args:
        data: The text.
        source: Where it comes from, for messages.

    Raises:
        MaskingError: It is no card, or altered.
        NewerFormatError: A newer fedkl wrote it.
    """
    return _parsed(
        data, kind=CARD, limit=MAX_CARD, source=source, build=card_of_values, written=card_to_bytes
    )


def roster_to_bytes(sealed: SealedRoster) -> bytes:
    """A roster, with the cohort's key wrapped for each member, as it is sent around."""
    values = {
        "format": COHORT,
        "version": VERSION,
        **roster_values(sealed.roster),
        "wrapped": {name: _base64(sealed.wrapped[name]) for name in sealed.roster.members},
        "signer": sealed.signer,
        "signature": _base64(sealed.signature),
    }
    return _text({**values, "checksum": hashlib.sha256(_text(values)).hexdigest()})


def roster_from_bytes(data: bytes, *, source: object = "Cohort") -> SealedRoster:
    """Reads what `roster_to_bytes` wrote. Dates are not looked at, nor whether the signer was entitled.

    Args:
        data: The text.
        source: Where it comes from, for messages.

    Raises:
        MaskingError: It is no roster, or altered.
        NewerFormatError: A newer fedkl wrote it.
    """
    return _parsed(data, kind=COHORT, limit=MAX_COHORT, source=source, build=_sealed, written=roster_to_bytes)


def card_values(card: MemberCard) -> dict[str, Any]:
    """A card as values that JSON has."""
    return {
        "name": card.name,
        "expires": card.expires.isoformat(),
        "identity": _base64(card.identity),
        "pair": _base64(card.pair),
        "receive_lattice": _base64(card.receive_lattice),
        "receive_curve": _base64(card.receive_curve),
        "signature": _base64(card.signature),
    }


def card_of_values(values: object) -> MemberCard:
    """The card that `card_values` wrote.

    Raises:
        ValueError: A field is missing, unknown or not as it should be.
        MaskingError: The card is not sound.
    """
    fields = Fields(values, place="card")
    card = MemberCard(
        name=fields.member("name"),
        expires=fields.day("expires"),
        identity=fields.raw("identity", 32),
        pair=fields.raw("pair", 32),
        receive_lattice=fields.raw("receive_lattice", 1184),
        receive_curve=fields.raw("receive_curve", 32),
        signature=fields.raw("signature", 64),
    )
    fields.done()
    _check_usable(card)
    return card


def roster_values(roster: Roster) -> dict[str, Any]:
    """A roster as values that JSON has."""
    rules = roster.rules
    return {
        "name": roster.name,
        "epoch": roster.epoch,
        "previous": _base64(roster.previous),
        "expires": roster.expires.isoformat(),
        "rules": {
            "mode": rules.mode,
            "bits": rules.bits,
            "minimum": rules.minimum,
            "max_samples": rules.max_samples,
            "sampled": rules.sampled,
            "server_model": rules.server_model,
        },
        "commitment": _base64(roster.commitment),
        "cards": [card_values(card) for card in roster.cards],
    }


def roster_of_values(values: object) -> Roster:
    """The roster that `roster_values` wrote.

    Raises:
        ValueError: A field is missing, unknown or not as it should be.
        MaskingError: The roster, or a card on it, is not sound.
    """
    fields = Fields(values, place="cohort")
    roster = _roster(fields)
    fields.done()
    return roster


def check_cohort_name(name: str) -> None:
    """Checks that a cohort can be called so.

    Raises:
        MaskingError: It cannot.
    """
    if not _COHORT_NAME.fullmatch(name):
        raise MaskingError(
            f"Cohort name {shown(name)}: expected letters, digits, spaces, '.', '_' and '-', 64 at most, a "
            "letter or digit first."
        )


def _roster(fields: Fields) -> Roster:
    name, epoch = fields.text("name"), fields.number("epoch", most=MAX_EPOCH)
    check_cohort_name(name)
    cards = fields.take("cards", list)
    if len(cards) > MAX_MEMBERS:
        raise ValueError(f"{len(cards)} cards, expected at most {MAX_MEMBERS}")
    return Roster(
        name=name,
        epoch=epoch,
        previous=fields.raw("previous", 32 if epoch else 0),
        expires=fields.day("expires"),
        rules=_rules(fields.take("rules", dict)),
        commitment=fields.raw("commitment", 32),
        cards=tuple(card_of_values(card) for card in cards),
    )


def _rules(values: dict[str, Any]) -> Rules:
    fields = Fields(values, place="rules")
    mode: Mode = fields.choice("mode", get_args(Mode))
    bits: WordBits = fields.choice("bits", get_args(WordBits))
    rules = Rules(
        mode=mode,
        bits=bits,
        minimum=fields.number("minimum"),
        max_samples=fields.number("max_samples"),
        sampled=fields.take("sampled", bool),
        server_model=fields.take("server_model", bool),
    )
    fields.done()
    return rules


def _sealed(values: object) -> SealedRoster:
    fields = Fields(values, place="cohort")
    roster = _roster(fields)
    keys = Fields(fields.take("wrapped", dict), place="wrapped keys")
    wrapped = {name: keys.raw(name, _WRAPPED) for name in roster.members}
    keys.done()
    signer, signature = fields.member("signer"), fields.raw("signature", 64)
    fields.text("checksum")  # compared with all the rest
    fields.done()
    sealed = SealedRoster(roster=roster, wrapped=wrapped, signer=signer, signature=signature)
    if roster.epoch == 0 and not sealed.signed_by_one_of(roster):
        raise ValueError("it is not signed by one of its members")
    return sealed


def _parsed(
    data: bytes,
    *,
    kind: str,
    limit: int,
    source: object,
    build: Callable[[object], _T],
    written: Callable[[_T], bytes],
) -> _T:
    """What a text says, if it says nothing else and in no other way."""
    values = _values(data, kind=kind, limit=limit, source=source)
    del values["format"], values["version"]
    try:
        found = build(values)
    except ValueError as error:
        raise MaskingError(f"{source}: altered or damaged: {error}. {_REMEDIES[kind]}") from error
    except MaskingError as error:
        raise MaskingError(f"{source}: {error}") from error
    if not hmac.compare_digest(written(found), data.replace(b"\r\n", b"\n").rstrip()):
        raise MaskingError(f"{source}: altered or damaged after it was written. {_REMEDIES[kind]}")
    return found


def _values(data: bytes, *, kind: str, limit: int, source: object) -> dict[str, Any]:
    if data.startswith(MAGIC):
        raise MaskingError(
            f"{source}: expected {_KINDS[kind]}, this is an encrypted file with secrets. Keep it to "
            "yourself, and give the file that was made to be sent around."
        )
    try:
        values = parse_json_object(data) if len(data) <= MAX_COHORT else {}
    except ValueError as error:  # its text may quote what was read
        raise MaskingError(f"{source}: not {_KINDS[kind]}, or damaged. {_REMEDIES[kind]}") from error
    found = values.get("format")
    if found != kind:
        what = _KINDS.get(found, "something else") if isinstance(found, str) else "something else"
        raise MaskingError(f"{source}: expected {_KINDS[kind]}, this is {what}. Give the other file.")
    if len(data) > limit:
        raise MaskingError(
            f"{source}: {len(data)} bytes, expected at most {limit} for {_KINDS[kind]}. {_REMEDIES[kind]}"
        )
    version = values.get("version")
    check_version(version, source=source, reads=VERSION)
    if type(version) is not int or version != VERSION:
        raise MaskingError(
            f"{source}: version {shown(version)[1:-1]}, this fedkl reads version {VERSION}. Take the same "
            "version of fedkl everywhere."
        )
    return values


def _check_usable(card: MemberCard) -> None:
    """Checks what the libraries would notice only when the keys are used, with errors of their own."""
    try:
        MLKEM768PublicKey.from_public_bytes(card.receive_lattice)
        for key in (card.pair, card.receive_curve):  # a point of small order gives everybody the same secret
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        raise ValueError(f"the card of {card.name} has a key that cannot be used") from None


def _text(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
