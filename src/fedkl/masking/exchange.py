"""What members do with files: make a member, found a cohort and change it, read what others have sent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from fedkl import lockfile
from fedkl.errors import MaskingError, shown
from fedkl.files import create_once, read_file, write_atomically
from fedkl.masking.cards import CARD_DAYS, MemberCard, MemberKeys, check_name, date_problem
from fedkl.masking.contents import SUFFIX
from fedkl.masking.files import MemberFile
from fedkl.masking.roster import Roster, Rules, SealedRoster, new_roster
from fedkl.masking.texts import (
    MAX_COHORT,
    card_from_bytes,
    card_to_bytes,
    check_cohort_name,
    roster_from_bytes,
    roster_to_bytes,
)

CARD_SUFFIX, COHORT_SUFFIX = ".member", ".cohort"
_PUBLIC_FILE = 0o644


def new_member(name: str, *, folder: Path, passphrase: str, today: date) -> tuple[Path, Path, bool]:
    """Makes a member: its secret file, and its card. A card that is missing is made again of the same keys.

    Args:
        name: The member's.
        folder: Where the files go.
        passphrase: Encrypts the secret file.
        today: The date.

    Returns:
        The secret file, the card, and whether the keys are new.

    Raises:
        MaskingError: The name does not fit, or a file is there already.
        KeyFileError: The secret file cannot be written, or one that is there does not open.
        OSError: The card cannot be written.
    """
    if name.endswith((SUFFIX, CARD_SUFFIX)):
        raise MaskingError(
            f"Member name {shown(name)}: expected a name, not a file. Leave the ending away, the files "
            "get theirs."
        )
    check_name(name)
    secret, card = folder / f"{name}{SUFFIX}", folder / f"{name}{CARD_SUFFIX}"
    has_keys = os.path.lexists(secret)
    if os.path.lexists(card):
        remedy = (
            "Send it around; for new keys, run this in another folder."
            if has_keys
            else f"Its {secret.name} is not here: put that back, or remove the card to make new keys."
        )
        raise MaskingError(f"{card}: exists already. Nothing was made. {remedy}")
    if has_keys:
        file = MemberFile.open(secret, passphrase=passphrase)
    else:
        keys = MemberKeys.new(name, today=today)
        file = MemberFile.create(secret, keys, passphrase=passphrase)
    with file:
        if file.keys.name != name:
            raise MaskingError(
                f"{secret}: holds the keys of {file.keys.name}, not of {name}. Rename the file."
            )
        write_once(card, card_to_bytes(file.keys.card()))
    return secret, card, not has_keys


def read_card(path: Path) -> MemberCard:
    """Reads a card; its date is not looked at.

    Raises:
        MaskingError: It is missing, something else, or altered.
    """
    return card_from_bytes(_read(path, CARD_SUFFIX), source=path)


def read_cohort(path: Path) -> SealedRoster:
    """Reads a cohort's file; dates are not looked at.

    Raises:
        MaskingError: It is missing, something else, or altered.
    """
    return roster_from_bytes(_read(path, COHORT_SUFFIX), source=path)


def found_cohort(
    path: Path, *, cards: Sequence[Path], rules: Rules, signer: MemberKeys, today: date
) -> SealedRoster:
    """Founds a cohort, and writes its file. The file's name is the cohort's.

    Args:
        path: Where to, ``NAME.cohort``; a file that is there is never replaced.
        cards: Files of all members' cards.
        rules: What the members agree on.
        signer: Keys of the member who does it.
        today: The date.

    Raises:
        MaskingError: A file is not what it should be, or the cards do not make a cohort.
        OSError: The file cannot be written.
    """
    if path.suffix != COHORT_SUFFIX:
        raise MaskingError(f"{path}: expected the name of the cohort's new file first, NAME{COHORT_SUFFIX}.")
    check_cohort_name(path.stem)
    if os.path.lexists(path):
        raise _there(path)
    members = _by_name(cards, today=today)
    if len(members) < rules.minimum:
        raise MaskingError(
            f"{path}: expected {rules.minimum} cards or more, got {len(members)}. Collect the others' first."
        )
    own = members.get(signer.name)
    if own != signer.card():
        problem = "is not among the cards" if own is None else "is not the card of this member's present keys"
        raise MaskingError(
            f"{path}: {signer.name}{CARD_SUFFIX} {problem}. Give the one that was made with the secret file."
        )
    sealed = new_roster(name=path.stem, cards=list(members.values()), rules=rules, signer=signer, today=today)
    write_once(path, roster_to_bytes(sealed))
    return sealed


def change_cohort(
    path: Path, *, add: Sequence[Path], remove: Sequence[str], member: MemberFile, today: date
) -> tuple[SealedRoster, Path]:
    """Makes the next epoch of a cohort, with a new key, and writes it in place of the one before.

    Args:
        path: The cohort's file; what it holds now is kept beside it, for members who have not joined it yet.
        add: Files of new members' cards.
        remove: Names of members who leave; one that is also added gets its new card.
        member: Who does it; has joined the epoch that is in the file.
        today: The date.

    Returns:
        The new epoch, and the copy of the one before.

    Raises:
        MaskingError: A file or a name is not what it should be, or the members that are left make no cohort.
        KeyFileError: The copy cannot be written.
        OSError: The file cannot be written; it stays as it was.
    """
    found = read_cohort(path).roster
    before = member.membership(found.name).roster
    if found.digest != before.digest:
        raise MaskingError(
            f"{path}: holds epoch {found.epoch} with the fingerprint {found.fingerprint}, but joined here is "
            f"epoch {before.epoch} with {before.fingerprint}. Join the newest file first."
        )
    sealed = new_roster(
        name=before.name,
        cards=_changed(path, before, added=_by_name(add, today=today), remove=remove, today=today),
        rules=before.rules,
        signer=member.keys,
        today=today,
        previous=before,
    )
    copy = lockfile.keep_copy(path)
    write_atomically(path, roster_to_bytes(sealed), mode=_PUBLIC_FILE)
    return sealed, copy


def write_once(path: Path, data: bytes) -> None:
    """Writes a file that others may read, if it is not there yet.

    Raises:
        MaskingError: It is there.
        OSError: It cannot be written.
    """
    if not create_once(path, data, mode=_PUBLIC_FILE):
        raise _there(path)


def _changed(
    path: Path, before: Roster, *, added: dict[str, MemberCard], remove: Sequence[str], today: date
) -> list[MemberCard]:
    unknown = [name for name in remove if name not in before.card_of]
    if unknown:
        raise MaskingError(
            f"{path}: there is no member {shown(unknown[0])} to remove. Its members are "
            f"{', '.join(before.members)}."
        )
    left = {name: card for name, card in before.card_of.items() if name not in remove}
    for name in added:
        if name in left:
            raise MaskingError(
                f"{path}: {name} is a member already. Give --remove {name} too to exchange its card."
            )
    cards = {**left, **added}
    if len(cards) < before.rules.minimum:
        raise MaskingError(
            f"{path}: {len(cards)} members would be left, the cohort's rules want {before.rules.minimum} or "
            "more. Add others in the same command, or found another cohort."
        )
    for card in cards.values():
        _check_date(f"{path}: the card of {card.name}", card, today)
    return list(cards.values())


def _by_name(paths: Sequence[Path], *, today: date) -> dict[str, MemberCard]:
    """Cards of several files."""
    places: dict[str, Path] = {}
    cards: dict[str, MemberCard] = {}
    for path in paths:
        card = read_card(path)
        if card.name in places:
            raise MaskingError(
                f"{path}: a card of {card.name}, as {places[card.name]} is. Give one card of each member; "
                "two with the same name need other names."
            )
        _check_date(f"{path}: the card of {card.name}", card, today)
        places[card.name], cards[card.name] = path, card
    return cards


def _check_date(subject: str, card: MemberCard, today: date) -> None:
    problem = date_problem(card.expires, today=today, days=CARD_DAYS)
    if problem:
        raise MaskingError(
            f"{subject} {problem}. Ask {card.name} for a new one, of `fedkl member new {card.name}` in a new "
            "folder."
        )


def _there(path: Path) -> MaskingError:
    return MaskingError(
        f"{path}: exists already, and stays as it is. Choose another name, or change it with `fedkl cohort "
        "change`."
        if path.suffix == COHORT_SUFFIX
        else f"{path}: exists already, and stays as it is."
    )


def _read(path: Path, suffix: str) -> bytes:
    try:
        return read_file(path, limit=MAX_COHORT)
    except OSError as error:
        raise MaskingError(f"{path}: cannot be read ({error.strerror}). Expected NAME{suffix}.") from error
    except ValueError as error:  # a null character in the name
        raise MaskingError(f"{shown(path)}: not the name of a file.") from error
