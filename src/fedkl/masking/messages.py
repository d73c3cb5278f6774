"""What members and server send each other, beside the call; see docs/masked.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedkl.masking.canonical import digest
from fedkl.masking.encoding import Bytes
from fedkl.masking.schedule import Call

NONCE = 32
"""Bytes of a nonce."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Upload:
    """A member's masked update.

    Attributes:
        member: Whose it is.
        context: Digest of the context that its keys are bound to.
        model: Digest of the model that was trained on.
        transcript: Digest of all sums before.
        nonce: Of this upload.
        words: Masked, shape ``(layout.size,)``.
        shares: Of the seed of its own mask, encrypted for each member and itself; empty without pair masks.
        commitment: To that seed; empty without pair masks.
    """

    member: str
    context: bytes = field(repr=False)
    model: bytes = field(repr=False)
    transcript: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    words: Bytes = field(repr=False)
    shares: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    commitment: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, kw_only=True)
class ListMessage:
    """What a member needs in order to reveal.

    Attributes:
        call: The attempt that it belongs to.
        listed: Nonces of the uploads that are in the sum, by member, sorted.
        shares: Encrypted for this member, by whose seed it is.
    """

    call: Call
    listed: Mapping[str, bytes] = field(repr=False)
    shares: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Reveal:
    """What opens masks of a sum.

    Attributes:
        member: Whose answer it is.
        shares: Of listed members' seeds, in the clear, by member.
        pairs: Seeds of the masks with members that are not listed, by member.
    """

    member: str
    shares: Mapping[str, bytes] = field(repr=False)
    pairs: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class SealedSum:
    """A sum, with all that a member needs to check it.

    Attributes:
        call: The attempt that gave it.
        model: Digest of the model that was trained on.
        transcript: Digest of all sums before.
        listed: Nonces of the uploads that are in it, by member, sorted.
        words: The sum, shape ``(layout.size,)``; masked, where the mode has blind masks.
    """

    call: Call
    model: bytes = field(repr=False)
    transcript: bytes = field(repr=False)
    listed: Mapping[str, bytes] = field(repr=False)
    words: Bytes = field(repr=False)


def list_digest(listed: Mapping[str, bytes]) -> bytes:
    """Digest of a list with its nonces."""
    return digest("list", [(name, nonce) for name, nonce in listed.items()])
