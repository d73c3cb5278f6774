"""Flower's messages as files of an input, and back.

``PREFIX/A/RECORD/NAME``   an array, as the bytes that came for it
``PREFIX/B/RECORD/NAME``   the same, but not marked as a NumPy array
``PREFIX/M/RECORD``        a MetricRecord, as JSON
``PREFIX/C/RECORD``        a ConfigRecord, as JSON; bytes are ``{"hex": "…"}``
``PREFIX/E``               instead of all that, an error with this text
``PREFIX/N``               the number of the node that sent it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from tests.fuzzing import mutation

_KINDS = {"A": "numpy.ndarray", "B": "torch.Tensor"}


def form_of(name: str) -> str:
    """How a file of a message is changed."""
    kind = f"{name}//".split("/")[1]
    return {"A": "npy", "B": "npy", "M": "json", "C": "json"}.get(kind, mutation.form_of(name))


def files_of(content: RecordDict, prefix: str) -> dict[str, bytes]:
    """A message's content as files."""
    files = {}
    for record, values in content.items():
        if isinstance(values, ArrayRecord):
            files |= {f"{prefix}/A/{record}/{name}": array.data for name, array in values.items()}
        else:
            kind = "M" if isinstance(values, MetricRecord) else "C"
            files[f"{prefix}/{kind}/{record}"] = json.dumps(dict(values)).encode()
    return files


def content_of(files: Mapping[str, bytes], prefix: str) -> RecordDict:
    """A message's content from files; what Flower itself does not let through is left out."""
    content = RecordDict()
    for name, data in files.items():
        start, _, rest = name.partition("/")
        kind, _, record = rest.partition("/")
        if start == prefix and _sendable(record):
            _add(content, kind, record, data)
    return content


def _add(content: RecordDict, kind: str, record: str, data: bytes) -> None:
    if kind in _KINDS:
        record, _, name = record.partition("/")
        arrays = content.setdefault(record, ArrayRecord())
        if isinstance(arrays, ArrayRecord):
            arrays[name] = Array("float32", (1,), _KINDS[kind], data)
    elif kind in ("M", "C"):
        content[record] = _filled(MetricRecord() if kind == "M" else ConfigRecord(), data)


def _filled(record: Any, data: bytes) -> Any:
    try:
        values = json.loads(data)
        pairs = list(values.items())
    except (ValueError, RecursionError, AttributeError):
        return record
    for key, value in pairs:
        if _sendable(key):
            try:
                record[key] = bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
            except (TypeError, ValueError, KeyError):
                continue
    return record


def _sendable(text: str) -> bool:
    """Protocol buffers carry no lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def replies_of(files: Mapping[str, bytes]) -> list[Message]:
    """The replies of an input, one for each prefix, in order."""
    prefixes = dict.fromkeys(name.partition("/")[0] for name in files if "/" in name)
    return [_reply(files, prefix) for prefix in prefixes]


def _reply(files: Mapping[str, bytes], prefix: str) -> Message:
    number = files.get(f"{prefix}/N", b"").strip()
    request = message(RecordDict(), node=int(number) if number.isdigit() and len(number) < 19 else 5)
    if f"{prefix}/E" in files:
        return Message(Error(0, files[f"{prefix}/E"].decode("utf-8", "replace")), reply_to=request)
    return Message(content_of(files, prefix), reply_to=request)


def message(content: RecordDict, *, kind: str = "train", node: int = 7) -> Message:
    """A message of the server's."""
    made = Message(content, dst_node_id=node, message_type=kind)
    made.metadata.__dict__["_message_id"] = "1"
    return made
