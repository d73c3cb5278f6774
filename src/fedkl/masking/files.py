"""A member's files: the encrypted secret file, and beside it the memory of its cohorts.

``hospital-a.secret``   private keys, cohorts' keys; see contents.py
``hospital-a.memory``   what it must not forget between messages, once it has taken part in a round
``hospital-a.member``   its card, to be sent around; see texts.py
``hospital-a.study.update``   its last update in cohort study, on a Flower node with pair masks
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn

from fedkl.errors import MaskingError, SecretError, shown
from fedkl.files import held
from fedkl.masking.cards import MemberKeys
from fedkl.masking.contents import SUFFIX, Content, Joined, check_secret_file
from fedkl.masking.memory import Memory
from fedkl.masking.memory_file import MemoryFile, memory_path
from fedkl.masking.roster import Membership, SealedRoster
from fedkl.masking.schedule import Secret
from fedkl.masking.texts import check_cohort_name
from fedkl.masking.update_file import UpdateFile


class MemberFile:
    """A member's secret file, open in this process only, until it is closed.

    It does not show, cannot be pickled, and what changes it is on disk before a method returns. Get one from
    `create` or `open`, best in a ``with`` statement.
    """

    def __init__(self, path: Path, *, content: Content, passphrase: Secret, lock: ExitStack) -> None:
        self.path = path
        self._content = content
        self._passphrase = passphrase
        self._lock: ExitStack | None = lock
        self._salt = os.urandom(16)  # shared, which saves deriving the key at every message
        self._memory_file = MemoryFile(memory_path(path), key=content.memory_key, restored=content.restored)
        self._memories: dict[str, Memory] = {}

    def __repr__(self) -> str:
        return f"MemberFile({str(self.path)!r}, name={self.keys.name!r}, cohorts={sorted(self.cohorts)})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("A MemberFile holds secrets and cannot be pickled.")

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)

    def __enter__(self) -> MemberFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def create(cls, path: str | Path, keys: MemberKeys, *, passphrase: str) -> MemberFile:
        """Writes new keys to a file, mode 0600, and opens it.

        Args:
            path: Where to; a file that is there is never replaced.
            keys: The keys.
            passphrase: Encrypts the file.

        Raises:
            KeyFileError: The file is there already, cannot be written, or the passphrase cannot be used.
            ConfigError: Another process has it open.
        """
        path = Path(path)
        with ExitStack() as stack:
            stack.enter_context(held(path))
            content = Content(keys=keys)
            content.write(path, passphrase=passphrase, salt=os.urandom(16), replace=False)
            secret = Secret(passphrase.encode())
            return cls(path, content=content, passphrase=secret, lock=stack.pop_all())

    @classmethod
    def open(cls, path: str | Path, *, passphrase: str) -> MemberFile:
        """Opens a member's secret file.

        Raises:
            KeyFileError: It is missing, damaged, something else, or does not open with this passphrase.
            ConfigError: Another process, or another part of this one, has it open.
        """
        path = Path(path)
        check_secret_file(path)
        with ExitStack() as stack:
            stack.enter_context(held(path))
            content = Content.read(path, passphrase=passphrase)
            secret = Secret(passphrase.encode())
            return cls(path, content=content, passphrase=secret, lock=stack.pop_all())

    def close(self) -> None:
        """Gives the file back to other processes; memories that came from it can be kept no more."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    @property
    def keys(self) -> MemberKeys:
        """The member's own."""
        return self._content.keys

    @property
    def cohorts(self) -> Mapping[str, Membership]:
        """What it holds of the cohorts that it has joined, by their names."""
        return MappingProxyType({name: joined.membership for name, joined in self._content.cohorts.items()})

    def membership(self, cohort: str | None = None) -> Membership:
        """What the member holds of a cohort.

        Args:
            cohort: Its name; None: the only one.

        Raises:
            MaskingError: It has not joined this one, none, or several.
        """
        cohorts = self.cohorts
        name = next(iter(cohorts)) if cohort is None and len(cohorts) == 1 else cohort
        if name is not None and name in cohorts:
            return cohorts[name]
        if not cohorts:
            remedy = "It has joined none yet. Run `fedkl cohort join NAME.cohort`."
        else:
            remedy = f"It has joined {', '.join(sorted(cohorts))}. Name one of these."
        which = "no cohort named" if name is None else f"no cohort {shown(name)}"
        raise MaskingError(f"{self.path}: {which}. {remedy}")

    def needs_fingerprint(self, sealed: SealedRoster) -> bool:
        """Whether people have to compare a roster's fingerprint before this member joins it.

        They need not if a member of the epoch before has signed it. But one member alone cannot change the
        rules, nor, where masks protect members from one another, who the members are: together with a server
        it could take those masks away, or put its own members into the others' place.
        """
        joined = self._content.cohorts.get(sealed.roster.name)
        if joined is None or joined.membership.roster.rules != sealed.roster.rules:
            return True
        return sealed.roster.rules.mode != "blind" and joined.membership.roster.cards != sealed.roster.cards

    def is_joined(self, sealed: SealedRoster) -> bool:
        """Whether this very roster is the one that is joined."""
        joined = self._content.cohorts.get(sealed.roster.name)
        return joined is not None and joined.membership.roster.digest == sealed.roster.digest

    def join(self, sealed: SealedRoster, *, today: date, fingerprint: str | None = None) -> Membership:
        """Takes a roster's key into the file. One that is joined already stays as it is, with its memory.

        Args:
            sealed: The roster.
            today: The date.
            fingerprint: The roster's, as the other members read it; see `needs_fingerprint` for when it may
                be missing.

        Returns:
            What the member holds now.

        Raises:
            MaskingError: The roster has expired, has another card of this member or a false key, does not
                follow the one that is joined, was left before, or has another fingerprint. Nothing is then
                changed.
            KeyFileError: The file cannot be written.
        """
        roster = sealed.roster
        if fingerprint is not None and fingerprint != roster.fingerprint:
            raise MaskingError(
                f"Cohort {roster.name}: its fingerprint is {roster.fingerprint}, not {shown(fingerprint)}. "
                "Either a letter was misread, or this is not the file that the others have: ask for it again."
            )
        membership = self._checked(sealed, today)
        if self.is_joined(sealed):
            return membership
        if fingerprint is None and self.needs_fingerprint(sealed):
            raise MaskingError(
                f"Cohort {roster.name}: nobody has compared its fingerprint, {roster.fingerprint}. Compare "
                "it with the others by phone, and give it."
            )
        cohorts = dict(self._content.cohorts)
        before = cohorts.get(roster.name)
        past = [] if before is None else [before.membership.roster.digest.hex()]
        lost = self._content.may_have_forgotten(roster)  # then a memory is counted that is not there
        cohorts[roster.name] = Joined(membership=membership, saved=int(lost))
        self._change(roster.name, cohorts, past=past)
        if before is not None:
            self.update_file(roster.name).remove()  # it was for the epoch before
        return membership

    def check(self, sealed: SealedRoster, *, today: date) -> None:
        """All checks of `join` but the fingerprint's, e.g. before people are asked to compare it.

        Raises:
            MaskingError: The roster would not be joined.
        """
        self._checked(sealed, today)

    def _checked(self, sealed: SealedRoster, today: date) -> Membership:
        self._check_open()
        roster = sealed.roster
        check_cohort_name(roster.name)
        roster.check_date(today)
        before = self._content.cohorts.get(roster.name)
        if before is not None and self.is_joined(sealed):
            return before.membership
        if before is not None:
            _check_follows(sealed, before.membership)
        elif roster.digest.hex() in self._content.past:
            raise MaskingError(
                f"Cohort {roster.name}, epoch {roster.epoch}: this member has left it, and forgotten what "
                "it has sent there. Have the cohort changed (`fedkl cohort change`), and join the new epoch."
            )
        return sealed.opened(self.keys)

    def end(self, cohort: str) -> None:
        """Destroys this member's copy of a cohort's key, what it remembers of it, and its last update.

        Args:
            cohort: The cohort's name.

        Raises:
            MaskingError: It has not joined this one.
            KeyFileError: A file cannot be written. If it is the secret file, nothing is changed; if it is the
                memory, that alone is left.
            NewerFormatError: A newer fedkl wrote the memory, which alone is left.
        """
        self._check_open()
        gone, update = self.membership(cohort).roster.digest.hex(), self.update_file(cohort)
        rest = {name: joined for name, joined in self._content.cohorts.items() if name != cohort}
        self._change(cohort, rest, past=[gone])
        update.remove()
        self._memory_file.forget(cohort)

    def memory(self, cohort: str | None = None) -> Memory:
        """What the member remembers of a cohort's present roster; its `keep` writes before it returns.

        Args:
            cohort: Its name; None: the only one.

        Raises:
            MaskingError: It has not joined this one, or the memory that was written last is not there.
        """
        self._check_open()
        roster = self.membership(cohort).roster
        found = self._memories.get(roster.name)
        if found is None:
            digest = roster.digest.hex()
            saved = self._content.cohorts[roster.name].saved
            values = self._memory_file.last(roster.name, roster=digest, saved=saved)

            def keep(memory: Memory) -> None:
                self._keep(roster.name, digest, memory)

            found = Memory(keep=keep) if values is None else Memory.from_json(values, keep=keep)
            self._memories[roster.name] = found
        return found

    def update_file(self, cohort: str | None = None) -> UpdateFile:
        """Where the member's last update in a cohort is kept, encrypted.

        Args:
            cohort: Its name; None: the only one.

        Raises:
            MaskingError: It has not joined this one.
        """
        return UpdateFile(self.beside(cohort, "update"), key=self._content.memory_key)

    def beside(self, cohort: str | None, suffix: str) -> Path:
        """The path of a file about a cohort, in the same folder.

        Args:
            cohort: Its name; None: the only one.
            suffix: The file's, without a dot.

        Raises:
            MaskingError: It has not joined this one.
        """
        name = self.membership(cohort).roster.name
        return self.path.with_name(f"{self.path.name.removesuffix(SUFFIX)}.{name}.{suffix}")

    def _keep(self, cohort: str, digest: str, memory: Memory) -> None:
        self._check_open()
        cohorts = self._content.cohorts
        joined = cohorts.get(cohort)
        if joined is None or joined.membership.roster.digest.hex() != digest:
            raise MaskingError(f"Cohort {cohort}: left or changed while a round was under way. Start again.")
        saved = self._memory_file.keep(
            cohort, roster=digest, saved=joined.saved, memory=memory, joined=cohorts
        )
        # The count comes after the memory: a memory that is ahead of its count is no older one.
        counted = Joined(membership=joined.membership, saved=saved)
        self._write(replace(self._content, cohorts={**cohorts, cohort: counted}))

    def _change(self, changed: str, cohorts: dict[str, Joined], *, past: list[str]) -> None:
        self._write(replace(self._content, cohorts=cohorts, past=self._content.past.union(past)))
        self._memories.pop(changed, None)

    def _write(self, content: Content) -> None:
        passphrase = self._passphrase.reveal().decode()
        content.write(self.path, passphrase=passphrase, salt=self._salt)
        self._content = content

    def _check_open(self) -> None:
        if self._lock is None:
            raise MaskingError(f"{self.path}: closed already. Open it again.")


def _check_follows(sealed: SealedRoster, before: Membership) -> None:
    """Checks that a roster is the next one, with an answer for those who have the wrong file."""
    roster, joined = sealed.roster, before.roster
    if roster.epoch <= joined.epoch:
        raise MaskingError(
            f"Cohort {roster.name}: this file is of epoch {roster.epoch}, and epoch {joined.epoch} with "
            f"the fingerprint {joined.fingerprint} is joined here. Ask for the newest file; to join a new "
            "cohort of this name, run `fedkl cohort end` first."
        )
    sealed.check_follows(joined)
