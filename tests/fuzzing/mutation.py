"""Changes of inputs: of bytes, and by format, so that what is changed is still read, not refused at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from tests.fuzzing import binaries, tensors, trees
from tests.fuzzing.bits import Change, mutated_bytes, mutated_text, spliced
from tests.fuzzing.sandbox import OUTSIDE

LONGEST = 1 << 16

FORMS: dict[str, Change] = {
    "bytes": mutated_bytes,
    "choice": mutated_bytes,
    "text": mutated_text,
    "json": trees.mutated_json,
    "jsonl": trees.mutated_lines,
    "toml": trees.mutated_toml,
    "manifest": trees.mutated_manifest,
    "safetensors": tensors.mutated_safetensors,
    "container": binaries.mutated_container,
    "npy": tensors.mutated_npy,
    "idx": binaries.mutated_idx,
    "png": binaries.mutated_png,
    "gz": binaries.mutated_gzip,
    "tgz": binaries.mutated_tar,
}
_BY_SUFFIX = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".toml": "toml",
    ".safetensors": "safetensors",
    ".fedkl": "container",
    ".npy": "npy",
    ".png": "png",
    ".gz": "gz",
    ".tgz": "tgz",
    ".txt": "text",
}
_NAMES = (
    "",
    "a",
    "..",
    "x" * 300,
    "a\x1b[31mb",
    "a\nb",
    "\udcff",
    "$x$",
    "%s",
    "<b>",
    "a b",
    "💥",
    "a/b",
    "-",
)


def form_of(name: str) -> str:
    """The format of a file, by its name."""
    return "idx" if name.endswith("ubyte") else _BY_SUFFIX.get(PurePosixPath(name).suffix, "bytes")


def mutated(data: bytes, form: str, rng: random.Random, other: bytes = b"") -> bytes:
    """Changes an input of a format once or a few times.

    Args:
        data: The input.
        form: One of `FORMS`.
        rng: Draws the changes.
        other: Another input of this format.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        draw = rng.random()
        if draw < 0.1:
            data = mutated_bytes(data, rng)
        elif draw < 0.13 and other:
            data = spliced(data, other, rng)
        else:
            data = _changed(data, form, rng)
    return data[:LONGEST]


def _changed(data: bytes, form: str, rng: random.Random) -> bytes:
    """A change of the format's own; as bytes where numbers have grown beyond what Python computes with."""
    try:
        return FORMS[form](data, rng)
    except (ArithmeticError, ValueError):
        return mutated_bytes(data, rng)


def mutated_files(
    files: Mapping[str, bytes],
    form: Callable[[str], str],
    rng: random.Random,
    others: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Changes the content of a file, or which files there are; one of the form "choice" but rarely."""
    files = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        names = list(files) if rng.random() < 0.05 else [name for name in files if form(name) != "choice"]
        name = rng.choice(names) if names else "new"
        if name in files and rng.random() < 0.85:
            other = others.get(name, b"")
            files[name] = mutated(files[name], form(name), rng, other)
        else:
            _rearrange(files, name, rng, others)
    return files


def _rearrange(files: dict[str, bytes], name: str, rng: random.Random, others: Mapping[str, bytes]) -> None:
    """Removes, renames, copies, links or empties a file, or takes one from another input."""
    content = files.get(name, b"")
    match rng.randrange(8):
        case 0:
            files.pop(name, None)
        case 1:
            files[_renamed(name, rng)] = files.pop(name, b"")
        case 2:
            files[_renamed(name, rng)] = content
        case 3:
            files[name] = b"@folder"
        case 4:
            target = rng.choice([*files, "nothing", OUTSIDE])
            files[name] = b"@link " + target.encode("utf-8", "surrogateescape")
        case 5:
            files[name] = b""
        case 6 if files:
            files[name] = files[rng.choice(list(files))]
        case _:
            files.update({name: others[name] for name in list(others)[: rng.randrange(3)]})


def _renamed(name: str, rng: random.Random) -> str:
    """Another name, below the same folder where it has one."""
    folder, slash, last = name.rpartition("/")
    odd = rng.choice((*_NAMES, *(last + part for part in _NAMES), *(part + last for part in _NAMES)))
    return f"{folder}{slash}{odd}"
