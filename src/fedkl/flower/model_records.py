"""The model of a round of masked sums as Flower's records, and back: the last sum, or one in the clear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedkl.errors import MaskingError
from fedkl.flower.record_fields import (
    PREFIX,
    WORDS,
    Fields,
    call_fields,
    call_in,
    paired,
    pairs,
    tensors_in,
    words_of,
    words_record,
)
from fedkl.flower.records import arrays_of, tensors_of
from fedkl.masking import Layout, SealedSum, Words
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec

_LAYOUT, _SUM, _BOOLEANS = (f"{PREFIX}.{part}" for part in ("layout", "sum", "booleans"))
_MAX_TENSORS = 200_000
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}


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
            **call_fields(total.call),
            "model": total.model,
            "transcript": total.transcript,
            **pairs(total.listed),
        }
    )
    content[WORDS] = words_record(total.words)
    content[_BOOLEANS] = arrays_of(base.booleans)


def base_of(content: RecordDict) -> Base:
    """The model of a message, as far as it is a sum.

    Raises:
        MaskingError: It says nothing that makes sense.
    """
    fields = Fields(content, _LAYOUT)
    names, dtypes, shapes = (fields.many(part, str) for part in ("names", "dtypes", "shapes"))
    if not len(names) == len(dtypes) == len(shapes) <= _MAX_TENSORS or len(set(names)) < len(names):
        raise fields.odd("names")
    metrics = tuple(fields.many("metrics", str))
    if not all(map(str.isprintable, (*names, *metrics))):  # they will stand in a log
        raise fields.odd("names")
    specs = {name: _spec(*about) for name, *about in zip(names, dtypes, shapes, strict=True)}
    total, booleans = None, {}
    if _SUM in content:
        about = Fields(content, _SUM)
        expected = [name for name, spec in specs.items() if spec.dtype is torch.bool]
        booleans = tensors_in(content, _BOOLEANS, names=expected)
        total = SealedSum(
            call=call_in(about),
            model=about.one("model", bytes),
            transcript=about.one("transcript", bytes),
            listed=paired(about),
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


def _spec(dtype: str, shape: str) -> TensorSpec:
    sizes = shape.split(",") if shape else []
    if dtype not in _DTYPES or not all(size.isascii() and size.isdigit() for size in sizes):
        raise MaskingError("Refused: a tensor of the layout has a shape or dtype that is none.")
    return TensorSpec(shape=tuple(map(int, sizes)), dtype=_DTYPES[dtype])
