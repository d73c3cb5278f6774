"""All keys of a member, derived where they are needed; see the table in docs/masked.md."""

from __future__ import annotations

from typing import Any, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedkl.errors import MaskingError, SecretError
from fedkl.masking import seal, sharing
from fedkl.masking.canonical import canonical
from fedkl.masking.encoding import Masks
from fedkl.masking.quorum import least_listed
from fedkl.masking.roster import Membership
from fedkl.masking.schedule import Context, Label, Secret, derive
from fedkl.masking.stream import MaskStream

_SHARE_NONCE = bytes(12)  # every key encrypts one share


class Keyring:
    """Derives a member's keys.

    Args:
        membership: Who it is, and its secrets.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._pairs: dict[str, Secret] = {}

    def __repr__(self) -> str:
        return f"Keyring({self._membership.name!r}, <secret>)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("A Keyring holds secrets and cannot be pickled.")

    def tag_key(self, context: Context, name: str, nonce: bytes) -> tuple[bytes, bytes]:
        """Both halves of an upload's tag key, 16 and 32 bytes."""
        return self.tag_r(context), self.tag_s(context, name, nonce)

    def tag_r(self, context: Context) -> bytes:
        """The half that a round's uploads share, 16 bytes."""
        return derive(self._key, Label.TAG_R, context.digest, length=16)

    def tag_s(self, context: Context, name: str, nonce: bytes) -> bytes:
        """The half that is one upload's, 32 bytes."""
        return derive(self._key, Label.TAG_S, context.digest, name, nonce, length=seal.SIZE)

    def blind_mask(self, context: Context, name: str, nonce: bytes) -> MaskStream:
        """The blind mask of an upload."""
        return MaskStream(derive(self._key, Label.BLIND_MASK, context.digest, name, nonce))

    def masks(self, context: Context, nonce: bytes) -> Masks:
        """All that this member adds to its upload, and takes away."""
        plus: list[MaskStream] = []
        minus: list[MaskStream] = []
        name = self._membership.name
        if context.mode != "pairwise":
            plus.append(self.blind_mask(context, name, nonce))
        if context.mode != "blind":
            plus.append(self_mask(self.self_seed(context, nonce)))
            for other in self.around(context):
                side = plus if name < other else minus
                side.append(MaskStream(self.pair_seed(context, other)))
        return Masks(plus=plus, minus=minus)

    def self_seed(self, context: Context, nonce: bytes) -> bytes:
        """The seed of this member's own mask, 32 bytes."""
        own = self._membership.keys.own_secret.reveal()
        return derive(own, Label.SELF, context.digest, nonce)

    def around(self, context: Context) -> tuple[str, ...]:
        """All other members of a cohort, sorted: with each of them there is a pair mask."""
        return tuple(name for name in context.call.cohort if name != self._membership.name)

    def pair_seed(self, context: Context, other: str) -> bytes:
        """The seed of the mask between this member and another, 32 bytes."""
        return derive(self._pair(other), Label.PAIR_MASK, context.digest)

    def shares(self, context: Context, nonce: bytes) -> dict[str, bytes]:
        """Shares of the self seed, each encrypted for its holder; this member is one itself."""
        name = self._membership.name
        points = {holder: place for place, holder in enumerate(context.call.cohort, start=1)}
        needed = least_listed(context.call.cohort, minimum=self._membership.roster.rules.minimum)
        found = sharing.split(self.self_seed(context, nonce), points=list(points.values()), threshold=needed)
        encrypted = {}
        for holder, point in points.items():
            cipher = self._share_cipher(context, name, holder, nonce)
            encrypted[holder] = cipher.encrypt(_SHARE_NONCE, found[point], canonical("share", name, holder))
        return encrypted

    def opened_share(self, context: Context, owner: str, nonce: bytes, encrypted: bytes) -> bytes:
        """The share that this member holds of another's self seed, 32 bytes.

        Raises:
            MaskingError: It was altered, or encrypted for something else.
        """
        name = self._membership.name
        cipher = self._share_cipher(context, owner, name, nonce)
        try:
            return cipher.decrypt(_SHARE_NONCE, encrypted, canonical("share", owner, name))
        except InvalidTag as error:
            raise MaskingError(f"Refused: the share of {owner}'s seed was altered on its way.") from error

    @property
    def _key(self) -> bytes:
        return self._membership.secret.reveal()

    def _pair(self, other: str) -> bytes:
        """The secret that two members share; K is mixed in, so that breaking X25519 alone opens nothing."""
        if other not in self._pairs:
            roster = self._membership.roster
            exchanged = self._membership.keys.exchanged(roster.card_of[other])
            names = sorted((self._membership.name, other))
            self._pairs[other] = Secret(derive(exchanged + self._key, Label.PAIR, roster.digest, names))
        return self._pairs[other].reveal()

    def _share_cipher(self, context: Context, owner: str, holder: str, nonce: bytes) -> AESGCM:
        name = self._membership.name
        other = holder if owner == name else owner
        secret = self._membership.keys.own_secret.reveal() if other == name else self._pair(other)
        return AESGCM(derive(secret, Label.PAIR_SHARE, context.digest, owner, holder, nonce))


def self_mask(seed: bytes) -> MaskStream:
    """The mask of a self seed."""
    return MaskStream(derive(seed, Label.SELF_MASK))


def self_commitment(seed: bytes) -> bytes:
    """The commitment to a self seed, 32 bytes."""
    return derive(seed, Label.SELF_COMMITMENT)
