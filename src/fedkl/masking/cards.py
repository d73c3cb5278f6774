"""A member: its private keys, and the card with its public ones."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, ClassVar, NoReturn

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from fedkl.errors import MaskingError, SecretError, shown
from fedkl.masking.canonical import canonical
from fedkl.masking.schedule import Secret

CARD_DAYS = 365
"""After so many days a card is refused; one that claims more as well."""

CLOCK_DAYS = 1  # the maker's clock may be ahead by so many

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9_-])?")
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_SIZES = {"identity": 32, "pair": 32, "receive_lattice": 1184, "receive_curve": 32, "signature": 64}


@dataclass(frozen=True, kw_only=True)
class MemberCard:
    """What a member shows the others.

    Attributes:
        name: Small letters, digits, ``.``, ``_`` and ``-``, at most 64.
        expires: The last day on which it is good.
        identity: Ed25519 public key, 32 bytes.
        pair: X25519 public key, 32 bytes.
        receive_lattice: ML-KEM-768 public key, 1,184 bytes; the cohort's key is wrapped for it and the next.
        receive_curve: X25519 public key, 32 bytes.
        signature: Of all the rest, by `identity`, 64 bytes.

    Raises:
        MaskingError: The name or a size does not fit, or the signature is not that of the card.
    """

    name: str
    expires: date
    identity: bytes = field(repr=False)
    pair: bytes = field(repr=False)
    receive_lattice: bytes = field(repr=False)
    receive_curve: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        wrong = [name for name, size in _SIZES.items() if len(getattr(self, name)) != size]
        if wrong:
            raise MaskingError(f"Card of {self.name}: {wrong[0]} has a wrong length. Ask for the card again.")
        try:
            Ed25519PublicKey.from_public_bytes(self.identity).verify(self.signature, self._signed())
        except InvalidSignature as error:
            raise MaskingError(
                f"Card of {self.name}: altered, its signature does not fit. Ask for the card again."
            ) from error

    def fields(self) -> tuple[str | bytes, ...]:
        """All that a roster's digest covers."""
        keys = (self.identity, self.pair, self.receive_lattice, self.receive_curve)
        return (self.name, self.expires.isoformat(), *keys, self.signature)

    def _signed(self) -> bytes:
        return canonical("card", *self.fields()[:-1])

    def wrap(self, secret: Secret, *, info: bytes) -> bytes:
        """A secret that only this member can open: 1,168 bytes for 32.

        Raises:
            MaskingError: A key of the card is none, or a point of small order.
        """
        try:
            lattice = MLKEM768PublicKey.from_public_bytes(self.receive_lattice)
            curve = X25519PublicKey.from_public_bytes(self.receive_curve)
            return _SUITE.encrypt(secret.reveal(), MLKEM768X25519PublicKey(lattice, curve), info=info)
        except ValueError as error:
            raise _unusable(self) from error

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Whether this member has signed something."""
        try:
            Ed25519PublicKey.from_public_bytes(self.identity).verify(signature, data)
        except InvalidSignature:
            return False
        return True


class MemberKeys:
    """A member's private keys. They cannot be pickled, and do not show.

    Args:
        name: The member's.
        expires: The last day of its card.
        seeds: Private keys as bytes, by `SEEDS`; from `new` or an encrypted file.

    Raises:
        MaskingError: The name or a seed does not fit.
    """

    SEEDS: ClassVar[dict[str, int]] = {
        "identity": 32,
        "pair": 32,
        "receive_lattice": 64,
        "receive_curve": 32,
        "self": 32,
    }
    """Names and sizes."""

    def __init__(self, *, name: str, expires: date, seeds: dict[str, Secret]) -> None:
        check_name(name)
        sizes = {kind: len(seed.reveal()) for kind, seed in seeds.items()}
        if sizes != self.SEEDS:
            raise MaskingError(f"Keys of {name}: damaged. Restore the member's file from a backup.")
        self.name = name
        self.expires = expires
        self.seeds = dict(seeds)
        raw = {kind: seed.reveal() for kind, seed in seeds.items()}
        self._identity = Ed25519PrivateKey.from_private_bytes(raw["identity"])
        self._pair = X25519PrivateKey.from_private_bytes(raw["pair"])
        self._lattice = MLKEM768PrivateKey.from_seed_bytes(raw["receive_lattice"])
        self._curve = X25519PrivateKey.from_private_bytes(raw["receive_curve"])

    def __repr__(self) -> str:
        return f"MemberKeys({self.name!r}, <secret>)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("Keys of a member cannot be pickled. They are saved in encrypted files only.")

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)

    @classmethod
    def new(cls, name: str, *, today: date) -> MemberKeys:
        """New keys from the operating system."""
        seeds = {kind: Secret(secrets.token_bytes(size)) for kind, size in cls.SEEDS.items()}
        return cls(name=name, expires=cls.expiry(today), seeds=seeds)

    @staticmethod
    def expiry(today: date) -> date:
        """The last day of a card that is made today."""
        return today + timedelta(days=CARD_DAYS)

    def card(self) -> MemberCard:
        """The public half, signed; the same every time."""
        keys = (
            self._identity.public_key().public_bytes_raw(),
            self._pair.public_key().public_bytes_raw(),
            self._lattice.public_key().public_bytes_raw(),
            self._curve.public_key().public_bytes_raw(),
        )
        signature = self._identity.sign(canonical("card", self.name, self.expires.isoformat(), *keys))
        identity, pair, lattice, curve = keys
        return MemberCard(
            name=self.name,
            expires=self.expires,
            identity=identity,
            pair=pair,
            receive_lattice=lattice,
            receive_curve=curve,
            signature=signature,
        )

    @property
    def own_secret(self) -> Secret:
        """What seeds of the member's own masks are derived from."""
        return self.seeds["self"]

    def exchanged(self, other: MemberCard) -> bytes:
        """X25519 with another member.

        Raises:
            MaskingError: The other's key is a point of small order.
        """
        try:
            return self._pair.exchange(X25519PublicKey.from_public_bytes(other.pair))
        except ValueError as error:
            raise _unusable(other) from error

    def unwrap(self, wrapped: bytes, *, info: bytes) -> Secret:
        """What was wrapped for this member.

        Raises:
            MaskingError: It was not wrapped for these keys and this info, or was altered.
        """
        private = MLKEM768X25519PrivateKey(self._lattice, self._curve)
        try:
            return Secret(_SUITE.decrypt(wrapped, private, info=info))
        except (InvalidTag, ValueError) as error:
            raise MaskingError(
                f"The cohort's key is not wrapped for {self.name}'s keys: another's file, or an altered one."
            ) from error

    def sign(self, data: bytes) -> bytes:
        """A signature of this member's identity, 64 bytes."""
        return self._identity.sign(data)


def _unusable(card: MemberCard) -> MaskingError:
    return MaskingError(f"Card of {card.name}: its key cannot be used. Leave this member out.")


def date_problem(expires: date, *, today: date, days: int) -> str | None:
    """What is wrong with the last day of a card or a roster; None: nothing.

    Args:
        expires: The last day.
        today: The date.
        days: How long it is good when it is new. Whoever makes one can write any date into it.
    """
    if expires < today:
        return f"expired on {expires}"
    if (expires - today).days > days + CLOCK_DAYS:
        claim = f"claims to be good until {expires}, longer than the {days} days that are allowed"
        return f"{claim}, or the clock of this machine is behind"
    return None


def check_name(name: object) -> None:
    """Checks that a member can be called so.

    Raises:
        MaskingError: It cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MaskingError(
            f"Member name {shown(name)}: expected small letters, digits, '.', '_' and '-', 64 at most, the "
            "first no sign, the last no dot."
        )
