"""Key schedule: the context of a round, and every key that is derived from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal, NoReturn

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedkl.errors import SecretError
from fedkl.masking.canonical import PROTOCOL, Field, canonical, digest

Mode = Literal["blind", "pairwise", "both"]
"""Which masks an upload gets: one of the cohort's key, pairs that cancel, or both."""


class Label(Enum):
    """What a derived key is for; the first field of HKDF's info."""

    COMMITMENT = "commitment"
    PAIR = "pair"
    PAIR_MASK = "pair.mask"
    PAIR_SHARE = "pair.share"
    SELF = "self"
    SELF_COMMITMENT = "self.commitment"
    SELF_MASK = "self.mask"
    BLIND_MASK = "blind.mask"
    TAG_R = "tag.r"
    TAG_S = "tag.s"
    SEGMENT = "segment"


def derive(secret: bytes, label: Label, *fields: Field, length: int = 32) -> bytes:
    """A key of a secret: HKDF-SHA256 with this protocol's salt, and label and fields as info.

    Source:
        RFC 5869.
    """
    info = canonical(label.value, *fields)
    return HKDF(algorithm=SHA256(), length=length, salt=PROTOCOL.encode(), info=info).derive(secret)


class Secret:
    """Secret bytes that do not show, copy or pickle by accident.

    Args:
        value: The bytes.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytes(value)

    def reveal(self) -> bytes:
        """The bytes. For key derivation and encrypted files only."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(<secret>)"

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("A secret of a member cannot be pickled. It is saved in encrypted files only.")

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a server asks for.

    Attributes:
        run: Names the training, 16 bytes; chosen by the server.
        round: From 0.
        attempt: From 0; a round is tried again with the members that are left.
        cohort: Names of the members that are asked, in order.
        settings: Digest of what else they are asked, e.g. for how long to train, 32 bytes; empty: nothing.
            Members who were asked differently have different contexts.
    """

    run: bytes
    round: int
    attempt: int
    cohort: tuple[str, ...]
    settings: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything that the keys of an attempt are bound to.

    Attributes:
        roster: Digest of the roster.
        layout: Digest of the layout.
        suite: Name of the primitives and of the words.
        mode: Which masks.
        call: What the server asks for.
        model: Digest of the model that is trained on.
        transcript: Digest of all sums before.
    """

    roster: bytes
    layout: bytes
    suite: str
    mode: Mode
    call: Call
    model: bytes
    transcript: bytes

    @cached_property
    def digest(self) -> bytes:
        """Of all fields, 32 bytes; ``ctx`` in docs/masked.md."""
        call = self.call
        return digest(
            "context",
            self.roster,
            self.layout,
            self.suite,
            self.mode,
            call.run,
            call.round,
            call.attempt,
            call.cohort,
            self.model,
            self.transcript,
            *([call.settings] if call.settings else []),
        )
