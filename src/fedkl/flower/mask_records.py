"""The messages of masked sums as Flower's records, and back; see docs/masked.md.

Whatever came is checked for its form only: what it means is for `fedkl.masking` to accept or refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from struct import pack
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedkl.errors import MaskingError, UpdateError, shown
from fedkl.flower.records import arrays_of, tensors_of
from fedkl.masking import Call, Layout, ListMessage, Mode, Reveal, Rules, SealedSum, Upload, Words
from fedkl.masking.canonical import Field, digest
from fedkl.masking.cards import check_name
from fedkl.masking.words import MAX_MEMBERS
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec

Stage = Literal["who", "train", "evaluate", "here", "reveal", "again", "deliver"]
"""What a message asks for: who the member is; an update; an evaluation; whether it is still there; what opens
the masks of a sum; the last update once more; that the model be written down."""

PREFIX = "fedkl-masks"
"""How the names of all records begin that are not the app's own."""

_STAGE, _CALL, _LAYOUT, _SUM, _LIST, _WHO, _UPLOAD, _REVEAL = (
    f"{PREFIX}.{part}" for part in ("stage", "call", "layout", "sum", "list", "who", "upload", "reveal")
)
_WORDS, _BOOLEANS = f"{PREFIX}.words", f"{PREFIX}.booleans"
_MAX_TENSORS, _MAX_TEXT = 200_000, 1000
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}
Record = ArrayRecord | MetricRecord | ConfigRecord
_Value = TypeVar("_Value", str, bytes, int)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """The model of a round: the last sum, or what the server sends in the clear.

    Attributes:
        run: The run's name.
        specs: What the model consists of, in order.
        metrics: That are averaged.
        rounds: That the server has called for so far.
        total: The last sum; None: the model comes in the clear.
        booleans: Boolean tensors, which are in no sum.
        record: Name of the record that the app expects the model in; empty, where the app is not asked.
    """

    run: bytes = field(repr=False)
    specs: Mapping[str, TensorSpec] = field(repr=False)
    metrics: tuple[str, ...]
    rounds: int
    total: SealedSum | None = field(repr=False)
    booleans: NamedTensors = field(repr=False)
    record: str = ""

    def layout(self, words: Words) -> Layout:
        """Where the numbers of an update lie."""
        return Layout(specs=self.specs, words=words, metrics=self.metrics)


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
    stage = _Fields(content, _STAGE).one("stage", str)
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
    fields = _Fields(content, _WHO)
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
    content[_CALL] = ConfigRecord(_call_fields(call))


def call_of(content: RecordDict) -> Call:
    """Which attempt of which round a message belongs to.

    Raises:
        MaskingError: It says nothing that makes sense.
    """
    return _call(_Fields(content, _CALL))


def put_base(content: RecordDict, base: Base) -> None:
    """Gives the model, as the last sum; one in the clear is the app's own record already."""
    content[_LAYOUT] = ConfigRecord(
        {
            "run": base.run,
            "record": base.record,
            "names": list(base.specs),
            "dtypes": [str(spec.dtype) for spec in base.specs.values()],
            "shapes": [",".join(map(str, spec.shape)) for spec in base.specs.values()],
            "metrics": list(base.metrics),
            "rounds": base.rounds,
        }
    )
    total = base.total
    if total is None:
        return
    content[_SUM] = ConfigRecord(
        {
            **_call_fields(total.call),
            "model": total.model,
            "transcript": total.transcript,
            **_pairs(total.listed),
        }
    )
    content[_WORDS] = _words_record(total.words)
    content[_BOOLEANS] = arrays_of(base.booleans)


def base_of(content: RecordDict) -> Base:
    """The model of a message, as far as it is a sum.

    Raises:
        MaskingError: It says nothing that makes sense.
    """
    fields = _Fields(content, _LAYOUT)
    names, dtypes, shapes = (fields.many(part, str) for part in ("names", "dtypes", "shapes"))
    if not len(names) == len(dtypes) == len(shapes) <= _MAX_TENSORS or len(set(names)) < len(names):
        raise fields.odd("names")
    metrics = tuple(fields.many("metrics", str))
    if not all(map(str.isprintable, (*names, *metrics))):  # they will stand in a log
        raise fields.odd("names")
    specs = {name: _spec(*about) for name, *about in zip(names, dtypes, shapes, strict=True)}
    total, booleans = None, {}
    if _SUM in content:
        about = _Fields(content, _SUM)
        expected = [name for name, spec in specs.items() if spec.dtype is torch.bool]
        booleans = _tensors(content, _BOOLEANS, names=expected)
        total = SealedSum(
            call=_call(about),
            model=about.one("model", bytes),
            transcript=about.one("transcript", bytes),
            listed=_paired(about),
            words=words_of(content),
        )
    return Base(
        run=fields.one("run", bytes),
        specs=specs,
        metrics=metrics,
        rounds=fields.one("rounds", int),
        total=total,
        booleans=booleans,
        record=fields.one("record", str),
    )


def booleans_of(arrays: ArrayRecord, specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """The boolean tensors of a model, which are in no sum."""
    names = [name for name, spec in specs.items() if spec.dtype is torch.bool]
    return tensors_of(ArrayRecord({name: arrays[name] for name in names}), subject="Model", names=names)


def put_list(content: RecordDict, message: ListMessage) -> None:
    """Gives a list of uploads, with the shares for one member."""
    put_call(content, message.call)
    content[_LIST] = ConfigRecord({**_pairs(message.listed), **_pairs(message.shares, "owners", "shares")})


def list_of(content: RecordDict) -> ListMessage:
    """A list of uploads.

    Raises:
        MaskingError: It says nothing that makes sense.
    """
    fields = _Fields(content, _LIST)
    shares = _paired(fields, "owners", "shares")
    return ListMessage(call=call_of(content), listed=_paired(fields), shares=shares)


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
            **_pairs(upload.shares, "owners", "shares"),
        }
    )
    content[_WORDS] = _words_record(upload.words)


def upload_of(content: RecordDict) -> Upload:
    """A masked update.

    Raises:
        MaskingError: It is none.
    """
    fields = _Fields(content, _UPLOAD)
    return Upload(
        member=fields.one("member", str),
        context=fields.one("context", bytes),
        model=fields.one("model", bytes),
        transcript=fields.one("transcript", bytes),
        nonce=fields.one("nonce", bytes),
        words=words_of(content),
        shares=_paired(fields, "owners", "shares"),
        commitment=fields.one("commitment", bytes),
    )


def put_reveal(content: RecordDict, reveal: Reveal) -> None:
    """Gives what opens masks."""
    fields = {**_pairs(reveal.shares, "owners", "shares"), **_pairs(reveal.pairs, "others", "seeds")}
    content[_REVEAL] = ConfigRecord({"member": reveal.member, **fields})


def reveal_of(content: RecordDict) -> Reveal:
    """What opens masks.

    Raises:
        MaskingError: It is nothing of the kind.
    """
    fields = _Fields(content, _REVEAL)
    shares, pairs = _paired(fields, "owners", "shares"), _paired(fields, "others", "seeds")
    return Reveal(member=fields.one("member", str), shares=shares, pairs=pairs)


def words_of(content: RecordDict) -> NDArray[np.uint8]:
    """The words of an upload or a sum, shape ``(bytes,)``.

    Raises:
        MaskingError: There are none.
    """
    words = _tensors(content, _WORDS, names=["words"])["words"]
    if words.dtype is not torch.uint8 or words.dim() != 1:
        raise MaskingError("Refused: expected words as a row of bytes.")
    return words.numpy()


def without_masks(content: RecordDict) -> dict[str, Record]:
    """The records of a message that are the app's own, by name."""
    return {name: record for name, record in content.items() if not name.startswith(PREFIX)}


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


class _Fields:
    """The fields of a ConfigRecord that came from elsewhere."""

    def __init__(self, content: RecordDict, name: str) -> None:
        record = content.get(name)
        if not isinstance(record, ConfigRecord):
            raise MaskingError(f"Refused: expected the record {name}.")
        self._record, self._name = record, name

    def one(self, field: str, kind: type[_Value]) -> _Value:
        return self._checked(self._record.get(field), field, kind)

    def many(self, field: str, kind: type[_Value]) -> list[_Value]:
        values = self._record.get(field)
        if not isinstance(values, list):
            raise self.odd(field)
        return [self._checked(value, field, kind) for value in values]

    def odd(self, field: str) -> MaskingError:
        return MaskingError(f"Refused: {self._name}: {field} is not what fedkl sends there.")

    def _checked(self, value: object, field: str, kind: type[_Value]) -> _Value:
        if type(value) is not kind or (isinstance(value, str) and len(value) > _MAX_TEXT):
            raise self.odd(field)
        return value


def _call_fields(call: Call) -> dict[str, Any]:
    return {
        "run": call.run,
        "round": call.round,
        "attempt": call.attempt,
        "cohort": list(call.cohort),
        "settings": call.settings,
    }


def _call(fields: _Fields) -> Call:
    return Call(
        run=fields.one("run", bytes),
        round=fields.one("round", int),
        attempt=fields.one("attempt", int),
        cohort=tuple(fields.many("cohort", str)),
        settings=fields.one("settings", bytes),
    )


def _pairs(
    values: Mapping[str, bytes], names: str = "listed", data: str = "nonces"
) -> dict[str, list[str] | list[bytes]]:
    return {names: list(values), data: list(values.values())}


def _paired(fields: _Fields, names: str = "listed", data: str = "nonces") -> dict[str, bytes]:
    keys, values = fields.many(names, str), fields.many(data, bytes)
    if len(keys) != len(values) or len(set(keys)) < len(keys) or len(keys) > MAX_MEMBERS:
        raise fields.odd(names)
    return dict(zip(keys, values, strict=True))


def _spec(dtype: str, shape: str) -> TensorSpec:
    sizes = shape.split(",") if shape else []
    if dtype not in _DTYPES or not all(size.isascii() and size.isdigit() for size in sizes):
        raise MaskingError("Refused: a tensor of the layout has a shape or dtype that is none.")
    return TensorSpec(shape=tuple(map(int, sizes)), dtype=_DTYPES[dtype])


def _words_record(words: NDArray[np.uint8]) -> ArrayRecord:
    return ArrayRecord({"words": Array(words)})


def _tensors(content: RecordDict, name: str, *, names: Iterable[str]) -> dict[str, torch.Tensor]:
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise MaskingError(f"Refused: expected the record {name}.")
    try:
        return tensors_of(record, subject=f"Record {name}", names=list(names))
    except UpdateError as error:
        raise MaskingError(str(error)) from error
