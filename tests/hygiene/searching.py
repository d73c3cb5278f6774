"""Searches all files of a folder for the numbers of secrets, in five encodings."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fedkl.secret_search import SecretSearch

_RUN = 4
_NUMBER = re.compile(rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_MOST = 2**22  # bytes of a file that are searched as SecretSearch does it, which takes a second a megabyte


@dataclass
class Found:
    """What a search has come to.

    Attributes:
        files: Searched.
        bytes: In all of them.
        secrets: Tensors that were looked for.
        leaks: One line for each file and secret that was found in it.
    """

    files: int = 0
    bytes: int = 0
    secrets: int = 0
    leaks: list[str] = field(default_factory=list)


def secrets_in(folder: Path) -> dict[str, torch.Tensor]:
    """What `stopping` has noted, each once; statistics at their start, all 0 or all 1, are no evidence."""
    found: dict[bytes, tuple[str, torch.Tensor]] = {}
    for path in sorted(folder.glob("*.pt")):
        for name, tensor in torch.load(path, weights_only=True).items():
            if tensor.numel() == 0 or bool((tensor == tensor.flatten()[0]).all()):
                continue
            found.setdefault(tensor.numpy().tobytes(), (f"{name} {len(found)}", tensor))
    return dict(found.values())


def search(folder: Path, secrets: dict[str, torch.Tensor]) -> Found:
    """Looks for four numbers in a row, in every file below a folder, its names included."""
    patterns = [(name, form) for name, tensor in secrets.items() for form in _patterns(tensor)]
    decimals = {name: numbers for name, tensor in secrets.items() if (numbers := _decimals(tensor))}
    net = SecretSearch(secrets.values())
    found = Found(secrets=len(secrets))
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        data = str(path).encode() + b"\n" + path.read_bytes()
        found.files += 1
        found.bytes += len(data)
        lower = data.lower()
        hits = {name for name, form in patterns if form in data or form.hex().encode() in lower}
        if data.isascii() or b"\0" not in data:
            hits |= {name for name, forms in _base64s(patterns) if any(form in data for form in forms)}
            written = {_rounded(float(number)) for number in _NUMBER.findall(data)}
            hits |= {name for name, numbers in decimals.items() if numbers <= written}
        if not hits and len(data) < _MOST and not data.partition(b"\n")[2].startswith(b"FEDKLSEC"):
            text = data.decode("utf-8", "replace")
            if net.in_bytes(data) or net.in_text(text):
                hits.add("found by fedkl.secret_search")
        found.leaks += [f"{path.relative_to(folder)}: {name}" for name in sorted(hits)]
    return found


def _patterns(tensor: torch.Tensor) -> Iterator[bytes]:
    """Four numbers from the start, the middle and the end, in both precisions and byte orders."""
    for run in _runs(tensor):
        for kind in ("<f4", ">f4", "<f8", ">f8"):
            yield run.astype(kind).tobytes()


def _runs(tensor: torch.Tensor) -> Iterator[np.ndarray]:
    numbers = tensor.double().flatten().numpy()
    for start in {0, len(numbers) // 2, max(0, len(numbers) - _RUN)}:
        run = numbers[start : start + _RUN]
        if len(set(run.tolist()) - {0.0, 1.0}) >= 3:  # constants are no evidence
            yield run


def _base64s(patterns: list[tuple[str, bytes]]) -> Iterator[tuple[str, list[bytes]]]:
    """What stays of bytes in base64 wherever they begin: the outer digits depend on what is beside."""
    for name, form in patterns:
        yield name, [base64.b64encode(bytes(pad) + form)[4:-4] for pad in range(3)]


def _decimals(tensor: torch.Tensor) -> set[str]:
    """The first numbers of a run as they are written, to six digits."""
    run = next(iter(_runs(tensor)), None)
    return set() if run is None else {_rounded(float(number)) for number in run} - {_rounded(0.0)}


def _rounded(number: float) -> str:
    return f"{abs(number):.6g}"
