"""What a member refuses before any key is used. Every sentence is for its own log only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedkl.errors import MaskingError
from fedkl.masking.canonical import digest
from fedkl.masking.memory import RunMemory
from fedkl.masking.messages import NONCE, SealedSum
from fedkl.masking.roster import Roster
from fedkl.masking.schedule import Call, Context

RUN = 16
"""Bytes of a run's name."""

_SETTINGS = (0, 32)


def check_run(run: bytes) -> None:
    """Checks a run's name, which is written down.

    Raises:
        MaskingError: It has another size.
    """
    if len(run) != RUN:
        raise MaskingError(f"Refused: expected a run's name of {RUN} bytes.")


def check_call(call: Call, roster: Roster) -> None:
    """Checks that the roster's members may be asked so.

    Raises:
        MaskingError: Run, round, attempt or settings make no sense, or the cohort is unsorted, repeated,
            foreign, too small, or not all members where the rules want all.
    """
    check_run(call.run)
    numbers = (call.round, call.attempt)
    if any(type(number) is not int or not 0 <= number < 2**40 for number in numbers):
        raise MaskingError("Refused: expected round and attempt from 0.")
    if len(call.settings) not in _SETTINGS:
        raise MaskingError("Refused: expected a digest of the settings, 32 bytes, or none.")
    _check_names(call.cohort, what="cohort", among=roster.members, least=roster.rules.minimum)
    may_be_part = call.attempt > 0 or roster.rules.sampled
    if not may_be_part and call.cohort != roster.members:
        raise MaskingError(
            "Refused: a round asks all members of the roster, as its rules have no sampled cohorts."
        )


def check_listed(listed: Mapping[str, bytes], call: Call, *, least: int) -> None:
    """Checks a list of uploads.

    Raises:
        MaskingError: It is unsorted, foreign or too short, or a nonce has a wrong size.
    """
    _check_names(list(listed), what="list", among=call.cohort, least=least)
    if any(len(nonce) != NONCE for nonce in listed.values()):
        raise MaskingError(f"Refused: expected nonces of {NONCE} bytes.")


def check_new(context: Context, remembered: RunMemory, *, name: str) -> None:
    """Checks that a member may upload to a context: its masks would be used for the first time.

    Raises:
        MaskingError: It is not asked, the round is past, the attempt was uploaded to, or it has revealed in
            this round for others than are asked.
    """
    call = context.call
    if name not in call.cohort:
        raise MaskingError("Refused: this member is not in the cohort that is asked.")
    if call.round < remembered.round or call.round <= remembered.opened:
        raise MaskingError("Refused: a past round.")
    if call.round > remembered.round:
        return
    if remembered.names and remembered.names != names_digest(call.cohort):
        raise MaskingError(
            "Refused: in this round this member has revealed for other members than are asked now. What both "
            "sums tell could be of fewer than the minimum."
        )
    same_again = call.attempt == remembered.attempt and context.mode == "blind"  # with a nonce of its own
    if call.attempt <= remembered.attempt and not same_again:
        raise MaskingError("Refused: this attempt was uploaded to already; its masks are used up.")


def check_same_start(model: bytes, remembered: RunMemory, roster: Roster) -> None:
    """Checks that a model in the clear does not follow an upload on another one, where the rules want sums.

    Sums on models that hardly differ would give away who is in one of them and not in the other.

    Raises:
        MaskingError: It does.
    """
    changed = remembered.round >= 0 and remembered.model != model.hex()
    if changed and not roster.rules.server_model:
        raise MaskingError(
            "Refused: the server sent another model, but this member has uploaded in this run already, and "
            "the rules of the roster want the sum. Begin another run."
        )


def check_own_entry(total: SealedSum, context: Context, remembered: RunMemory, *, name: str) -> None:
    """Checks that a member is listed with what it sent, and only then.

    Raises:
        MaskingError: The list has something else of it.
    """
    came = total.listed.get(name)
    if came is None or total.call.round < remembered.round:  # those of earlier rounds are forgotten
        return
    if came.hex() not in remembered.uploads.get(context.digest.hex(), "").split():
        raise MaskingError("Refused: the list has an upload of this member that it did not send.")


def check_sequence(total: SealedSum, remembered: RunMemory, following: bytes) -> None:
    """Checks that a sum is the one after the last, the last one again, or, after an absence, a later one.

    Args:
        total: The sum.
        remembered: What the member remembers of the run.
        following: The transcript with this sum.

    Raises:
        MaskingError: It is none of them.
    """
    if remembered.transcript == following.hex():
        return
    round = total.call.round
    if round <= remembered.opened:
        raise MaskingError("Refused: another sum of a round that has one, or the sum of a past round.")
    known = (remembered.model, remembered.transcript)
    nothing_between = round == remembered.round or round == remembered.opened + 1 > 0
    if remembered.model and nothing_between and known != (total.model.hex(), total.transcript.hex()):
        raise MaskingError("Refused: the sum follows other sums than those that this member has opened.")


def _check_names(names: Sequence[str], *, what: str, among: Sequence[str], least: int) -> None:
    problems = {
        "is not sorted": list(names) != sorted(names),
        "repeats a name": len(set(names)) < len(names),
        "has names that do not belong there": not set(names) <= set(among),
        f"has {len(names)} names, expected {least} or more": len(names) < least,
    }
    for problem, holds in problems.items():
        if holds:
            raise MaskingError(f"Refused: the {what} {problem}.")


def names_digest(names: Iterable[str]) -> str:
    """Tells one set of members from another, in hexadecimal."""
    return digest("names", list(names)).hex()
