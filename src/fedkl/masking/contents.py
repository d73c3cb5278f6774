"""What a member's secret file holds, as tensors and metadata of a container.

Seeds of the private keys, the cohorts that were joined, with their keys, and how often the memory of each was
written. Everything secret is a tensor of bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from fedkl import lockfile
from fedkl.errors import KeyFileError, MaskingError, shown
from fedkl.files import read_file
from fedkl.formats import check_version
from fedkl.masking.cards import CLOCK_DAYS, MemberKeys
from fedkl.masking.roster import ROSTER_DAYS, Membership, Roster
from fedkl.masking.schedule import Secret
from fedkl.masking.texts import roster_of_values, roster_values
from fedkl.types import NamedTensors

SUFFIX = ".secret"
_VERSION = 1
_SEED, _COHORT, _MEMORY = "seed/", "cohort/", "memory"


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A cohort that was joined.

    Attributes:
        membership: Who it is, and the cohort's key.
        saved: How often the memory of this roster was written.
    """

    membership: Membership
    saved: int = 0


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a secret file holds.

    Attributes:
        keys: The member's own.
        memory_key: Encrypts the memory file, 32 bytes.
        cohorts: Those that were joined, by name.
        past: Digests of rosters that were left, as hexadecimal text. None of them is joined again: its memory
            is gone.
        restored: The day on which the file was made from a backup; None: never.
    """

    keys: MemberKeys
    memory_key: Secret = field(default_factory=lambda: Secret(secrets.token_bytes(32)))
    cohorts: Mapping[str, Joined] = field(default_factory=dict)
    past: frozenset[str] = frozenset()
    restored: date | None = None

    @classmethod
    def read(cls, path: Path, *, passphrase: str) -> Content:
        """Reads a secret file.

        Raises:
            KeyFileError: It is damaged, foreign, or does not open with this passphrase.
            NewerFormatError: A newer fedkl wrote it.
        """
        return cls.of(path, *lockfile.read(path, kind="member", passphrase=passphrase))

    @classmethod
    def of(cls, path: Path, meta: dict[str, Any], tensors: NamedTensors) -> Content:
        """What a container's metadata and tensors are, of a secret file or of one within a backup.

        Args:
            path: The file that they are from; errors name it.
            meta: The metadata.
            tensors: The tensors.

        Raises:
            KeyFileError: They are not those of a member.
            NewerFormatError: A newer fedkl wrote them.
        """
        check_version(meta.get("version"), source=path, reads=_VERSION)
        try:
            return _content(meta, tensors)
        except (KeyError, TypeError, ValueError, MaskingError) as error:
            raise KeyFileError(
                f"{path}: holds no member's keys that can be used. Restore it from a backup."
            ) from error

    def write(self, path: Path, *, passphrase: str, salt: bytes, replace: bool = True) -> None:
        """Writes it, atomically, mode 0600.

        Raises:
            KeyFileError: It cannot be written; the file before stays.
        """
        cohorts = {
            name: {"roster": roster_values(joined.membership.roster), "saved": joined.saved}
            for name, joined in self.cohorts.items()
        }
        meta = {
            "version": _VERSION,
            "name": self.keys.name,
            "expires": self.keys.expires.isoformat(),
            "cohorts": cohorts,
            "past": sorted(self.past),
        }
        if self.restored is not None:
            meta["restored"] = self.restored.isoformat()
        hidden = {_SEED + kind: seed for kind, seed in self.keys.seeds.items()}
        hidden |= {_COHORT + name: joined.membership.secret for name, joined in self.cohorts.items()}
        hidden[_MEMORY] = self.memory_key
        tensors = {name: lockfile.byte_tensor(secret.reveal()) for name, secret in hidden.items()}
        lockfile.write(
            path,
            kind="member",
            meta=meta,
            tensors=tensors,
            passphrase=passphrase,
            salt=salt,
            replace=replace,
        )

    def as_restored(self, today: date) -> Content:
        """The same member without its memory: no backup holds it, as an old one lets masks be used twice.

        Of every cohort one memory more is counted than there is, and no memory file of before opens. So the
        member opens sums, but takes no part until a cohort is changed.

        Args:
            today: The date. Rosters of up to this day may have been joined after the backup.
        """
        cohorts = {name: replace(joined, saved=joined.saved + 1) for name, joined in self.cohorts.items()}
        return replace(self, memory_key=Secret(secrets.token_bytes(32)), cohorts=cohorts, restored=today)

    def may_have_forgotten(self, roster: Roster) -> bool:
        """Whether a roster may have been joined and used before the file was restored, unknown to it."""
        made = roster.expires - timedelta(days=ROSTER_DAYS)
        return self.restored is not None and made < free_from(self.restored)


def free_from(restored: date) -> date:
    """The first date of rosters that a member surely has not joined before it was restored.

    Their maker's clock may be ahead.
    """
    return restored + timedelta(days=1 + CLOCK_DAYS)


def check_secret_file(path: Path) -> None:
    """Checks that a file is encrypted at all; a card has a name much like it.

    Raises:
        KeyFileError: It is something else, or cannot be read.
    """
    if path.is_symlink():  # what is written would take the link's place, and leave the file behind, older
        raise KeyFileError(f"{path}: expected a file, got a symbolic link. Give the file itself.")
    try:
        data = read_file(path)
    except OSError as error:
        raise KeyFileError(
            f"{path}: cannot be read ({error.strerror}). Give the file that `fedkl member new` made, "
            f"NAME{SUFFIX}."
        ) from error
    except ValueError as error:  # a null character in the name
        raise KeyFileError(f"{shown(path)}: not the name of a file.") from error
    if not data.startswith(lockfile.MAGIC):
        raise KeyFileError(
            f"{path}: not a member's secret file. Give the file that `fedkl member new` made, NAME{SUFFIX}."
        )


def _content(meta: dict[str, Any], tensors: NamedTensors) -> Content:
    fields = {"version", "name", "expires", "cohorts", "past"}
    if set(meta) - {"restored"} != fields or meta["version"] != _VERSION:
        raise ValueError
    hidden = {name: Secret(lockfile.bytes_of(tensor)) for name, tensor in tensors.items()}
    memory_key = hidden.pop(_MEMORY)
    seeds = {name[len(_SEED) :]: hidden.pop(name) for name in list(hidden) if name.startswith(_SEED)}
    keys = MemberKeys(name=meta["name"], expires=date.fromisoformat(meta["expires"]), seeds=seeds)
    cohorts = {
        str(name): _joined(values, keys=keys, secret=hidden.pop(_COHORT + name))
        for name, values in dict(meta["cohorts"]).items()
    }
    if hidden or any(name != joined.membership.roster.name for name, joined in cohorts.items()):
        raise ValueError
    past = frozenset(digest_of(text) for text in list(meta["past"]))
    restored = date.fromisoformat(meta["restored"]) if "restored" in meta else None
    return Content(keys=keys, memory_key=memory_key, cohorts=cohorts, past=past, restored=restored)


def _joined(values: dict[str, Any], *, keys: MemberKeys, secret: Secret) -> Joined:
    if set(values) != {"roster", "saved"}:
        raise ValueError
    membership = Membership(roster=roster_of_values(values["roster"]), keys=keys, secret=secret)
    return Joined(membership=membership, saved=count_of(values["saved"]))


def count_of(value: object) -> int:
    """A count, as it was read.

    Raises:
        ValueError: It is none.
    """
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def digest_of(value: object) -> str:
    """A digest of 32 bytes, as it was read.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, str) or len(bytes.fromhex(value)) != 32:
        raise ValueError
    return value
