"""Several named files as one input, so that an engine that only knows bytes can work on all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote_from_bytes, unquote_to_bytes

_HEAD = re.compile(rb"^=== ([^\n]{1,400}) ===\n", re.MULTILINE)
_SAFE = "/ !#$&'()*+,;=?@[]^_`{|}~:<>\"-."


def packed(files: Mapping[str, bytes]) -> bytes:
    """The files as one input; names are percent-encoded where they are not plain ASCII."""
    parts = []
    for name, content in files.items():
        quoted = quote_from_bytes(name.encode("utf-8", "surrogateescape"), safe=_SAFE)
        parts.append(f"=== {quoted} ===\n".encode() + content + b"\n")
    return b"".join(parts)


def unpacked(data: bytes) -> dict[str, bytes]:
    """The files of an input. Any bytes have a reading: what stands before the first name is left out."""
    heads = list(_HEAD.finditer(data))
    starts = [head.start() - 1 for head in heads]  # a newline ends the file before
    ends = [*starts[1:], len(data) - data.endswith(b"\n")]
    return {
        unquote_to_bytes(head[1]).decode("utf-8", "surrogateescape"): data[head.end() : max(head.end(), end)]
        for head, end in zip(heads, ends, strict=False)
    }
