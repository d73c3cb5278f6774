"""The messages of masked sums as Flower's records, and back; see docs/masked.md.

Whatever came is checked for its form only: what it means is for `fedkl.masking` to accept or refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import pack
from typing import Any, Literal, get_args

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedkl.errors import MaskingError, shown
from fedkl.flower.record_fields import (
    PREFIX,
    WORDS,
    Fields,
    call_fields,
    call_in,
    paired,
    pairs,
    words_of,
    words_record,
)
from fedkl.masking import Call, ListMessage, Mode, Reveal, Rules, Upload, Words
from fedkl.masking.canonical import Field, digest
from fedkl.masking.cards import check_name
from fedkl.masking.words import MAX_MEMBERS

Stage = Literal["who", "train", "evaluate", "here", "reveal", "again", "deliver"]
"""What a message asks for: who the member is; an update; an evaluation; whether it is still there; what opens
the masks of a sum; the last update once more; that the model be written down."""

_STAGE, _CALL, _LIST, _WHO, _UPLOAD, _REVEAL = (
    f"{PREFIX}.{part}" for part in ("stage", "call", "list", "who", "upload", "reveal")
)
Record = ArrayRecord | MetricRecord | ConfigRecord

MASKS_REFUSED = "fedkl: this member refused the message; the reason is in its node's log."
"""All that a server ever learns: neither whether it was refused or failed, nor why."""


@dataclass(frozen=True, kw_only=True)
class Who:
    """What a node says of its member, so that the server knows whom to ask for what.

    Attributes:
        member: Its name.
        cohort: The cohort's name.
        epoch: Of the roster.
        roster: The roster's digest.
        members: Of the roster, sorted.
        rules: That they agreed on.
    """

    member: str
    cohort: str
    epoch: int
    roster: bytes = field(repr=False)
    members: tuple[str, ...] = field(repr=False)
    rules: Rules

    @property
    def words(self) -> Words:
        """How numbers become words."""
        rules = self.rules
        return Words(bits=rules.bits, members=len(self.members), max_samples=rules.max_samples)


def put_stage(content: RecordDict, stage: Stage) -> None:
    """Says what a message asks for."""
    content[_STAGE] = ConfigRecord({"stage": stage})


def stage_of(content: RecordDict) -> Stage | None:
    """What a message asks for; None: it is not one of masked sums.

    Raises:
        MaskingError: Something that there is not.
    """
    if _STAGE not in content:
        return None
    stage = Fields(content, _STAGE).one("stage", str)
    for known in get_args(Stage):
        if stage == known:
            return known  # type: ignore[no-any-return]
    raise MaskingError(f"Refused: a message that asks for {shown(stage)}, which there is not.")


def put_who(content: RecordDict, who: Who) -> None:
    """Says who a node's member is."""
    rules = who.rules
    content[_WHO] = ConfigRecord(
        {
            "member": who.member,
            "cohort": who.cohort,
            "epoch": who.epoch,
            "roster": who.roster,
            "members": list(who.members),
            "mode": rules.mode,
            "numbers": [rules.bits, rules.minimum, rules.max_samples],
            "sampled": int(rules.sampled),
            "server-model": int(rules.server_model),
        }
    )


def who_of(content: RecordDict) -> Who:
    """Who a node says that its member is.

    Raises:
        MaskingError: It says nothing that makes sense.
    """
    fields = Fields(content, _WHO)
    mode = fields.one("mode", str)
    numbers = fields.many("numbers", int)
    if len(numbers) != 3 or mode not in get_args(Mode) or numbers[0] not in (32, 64):
        raise fields.odd("numbers")
    bits, minimum, max_samples = numbers
    members = tuple(fields.many("members", str))
    member = fields.one("member", str)
    if list(members) != sorted(set(members)) or member not in members or len(members) > MAX_MEMBERS:
        raise fields.odd("members")
    for name in members:  # they will stand in a log
        check_name(name)
    return Who(
        member=member,
        cohort=fields.one("cohort", str),
        epoch=fields.one("epoch", int),
        roster=fields.one("roster", bytes),
        members=members,
        rules=Rules(
            mode=mode,  # type: ignore[arg-type]  # one of Mode
            bits=64 if bits == 64 else 32,
            minimum=minimum,
            max_samples=max_samples,
            sampled=bool(fields.one("sampled", int)),
            server_model=bool(fields.one("server-model", int)),
        ),
    )


def put_call(content: RecordDict, call: Call) -> None:
    """Says which attempt of which round a message belongs to."""
    content[_CALL] = ConfigRecord(call_fields(call))


def call_of(content: RecordDict) -> Call:
    """Which attempt of which round a message belongs to.

    Raises:
        MaskingError: It says nothing that makes sense.
    """
    return call_in(Fields(content, _CALL))


def put_list(content: RecordDict, message: ListMessage) -> None:
    """Gives a list of uploads, with the shares for one member."""
    put_call(content, message.call)
    content[_LIST] = ConfigRecord({**pairs(message.listed), **pairs(message.shares, "owners", "shares")})


def list_of(content: RecordDict) -> ListMessage:
    """A list of uploads.

    Raises:
        MaskingError: It says nothing that makes sense.
    """
    fields = Fields(content, _LIST)
    shares = paired(fields, "owners", "shares")
    return ListMessage(call=call_of(content), listed=paired(fields), shares=shares)


def put_upload(content: RecordDict, upload: Upload) -> None:
    """Gives a masked update."""
    content[_UPLOAD] = ConfigRecord(
        {
            "member": upload.member,
            "context": upload.context,
            "model": upload.model,
            "transcript": upload.transcript,
            "nonce": upload.nonce,
            "commitment": upload.commitment,
            **pairs(upload.shares, "owners", "shares"),
        }
    )
    content[WORDS] = words_record(upload.words)


def upload_of(content: RecordDict) -> Upload:
    """A masked update.

    Raises:
        MaskingError: It is none.
    """
    fields = Fields(content, _UPLOAD)
    return Upload(
        member=fields.one("member", str),
        context=fields.one("context", bytes),
        model=fields.one("model", bytes),
        transcript=fields.one("transcript", bytes),
        nonce=fields.one("nonce", bytes),
        words=words_of(content),
        shares=paired(fields, "owners", "shares"),
        commitment=fields.one("commitment", bytes),
    )


def put_reveal(content: RecordDict, reveal: Reveal) -> None:
    """Gives what opens masks."""
    fields = {**pairs(reveal.shares, "owners", "shares"), **pairs(reveal.pairs, "others", "seeds")}
    content[_REVEAL] = ConfigRecord({"member": reveal.member, **fields})


def reveal_of(content: RecordDict) -> Reveal:
    """What opens masks.

    Raises:
        MaskingError: It is nothing of the kind.
    """
    fields = Fields(content, _REVEAL)
    shares, pairs = paired(fields, "owners", "shares"), paired(fields, "others", "seeds")
    return Reveal(member=fields.one("member", str), shares=shares, pairs=pairs)


def without_masks(content: RecordDict) -> dict[str, Record]:
    """The records of a message that are the app's own, by name."""
    return {name: record for name, record in content.items() if not name.startswith(PREFIX)}


def in_order(records: Mapping[str, Record]) -> dict[str, Record]:
    """Records by name, and their entries by key: an app may go by the order, which no digest binds else."""
    kinds: dict[str, Any] = {name: type(record) for name, record in records.items()}
    return {name: kinds[name](dict(sorted(record.items()))) for name, record in sorted(records.items())}


def settings_of(message: Message, *, model: str) -> bytes:
    """Digest of all that an app gets beside the model, 32 bytes: members of one sum are asked the same.

    Otherwise a server that reads the sum has one member train, the others not, and reads one update.

    Args:
        message: As it is for the app, or with the records of masked sums.
        model: Name of the record that holds the model.
    """
    records: list[Field] = []
    for name, record in sorted(without_masks(message.content).items()):
        if name != model:
            values = [[key, _field(value)] for key, value in sorted(record.items())]
            records.append([name, type(record).__name__, values])
    about = message.metadata
    return digest("settings", about.message_type, about.group_id, model, records)


def _field(value: object) -> Field:
    """A value of a record; one of another kind is another one."""
    if isinstance(value, list):
        return ["list", *map(_field, value)]
    if isinstance(value, bool):
        return ["bool", int(value)]
    if isinstance(value, float):
        return ["float", pack("<d", value)]
    if isinstance(value, (str, bytes, int)):
        return value
    raise MaskingError("Refused: arrays beside the model. An app gets one model, the one that was checked.")
