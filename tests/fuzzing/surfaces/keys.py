"""Key and lock files, encrypted and not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fedkl
from fedkl import Key
from fedkl.locking import load_memory
from tests.fuzzing.binaries import PASSPHRASE, container_parts
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import Surface


def _net() -> nn.Module:
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 2))


_LOCKS: tuple[dict[str, Any], ...] = (
    {},
    {"layers": "all", "share_statistics": True},
    {"layers": "all", "chained": False, "activation": "relu"},
    {"granularity": "element", "example_inputs": torch.zeros(1, 3, 8, 8)},
    {"layers": "classifier", "private": ["stem"]},
)


class Keys(Surface):
    """`load_key`, `load_lock` and `load_memory` on one file; a lock that loads must also work."""

    name = "keys"
    form = "container"
    quick = 300
    target = "fedkl.load_key"

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._model = _net()
        self._images = torch.rand(2, 3, 8, 8)

    def seeds(self) -> list[bytes]:
        """Keys and locks of all kinds."""
        with tempfile.TemporaryDirectory() as folder:
            return [_written(write, Path(folder) / "file", p) for write, p in self._writers()]

    def _writers(self) -> Iterator[tuple[Callable[..., None], str | None]]:
        for passphrase in (None, PASSPHRASE):
            for distribution in ("normal", "uniform"):
                key = Key.generate(length=8, distribution=distribution)
                yield (lambda path, k=key, **p: fedkl.save_key(k, path, **p)), passphrase
            for options in _LOCKS:
                memory = {"momentum/5.weight": torch.arange(4.0)} if options else {}
                lock = fedkl.lock(self._model, key=Key.generate(length=4), **options)
                yield (lambda path, o=lock, m=memory, **p: o.save(path, memory=m, **p)), passphrase

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Opens the file as everything that it may be."""
        path = sandbox.place / "file.fedkl"
        path.write_bytes(data)
        for passphrase in _passphrases(data):
            self.attempt(lambda p=passphrase: fedkl.load_key(path, passphrase=p))
            self.attempt(lambda p=passphrase: load_memory(path, passphrase=p))
        self._use(path, _passphrases(data)[0])

    def _use(self, path: Path, passphrase: str | None) -> None:
        fedkl.load_lock(path, self._model, passphrase=passphrase).model.eval()(self._images)


def _written(write: Callable[..., None], path: Path, passphrase: str | None) -> bytes:
    write(path, passphrase=passphrase)
    return path.read_bytes()


def _passphrases(data: bytes) -> tuple[str | None, ...]:
    """Both where the file does not say: deriving one takes time."""
    parts = container_parts(data)
    kind = parts[0].get("encryption") if parts else None
    return {"none": (None,), "aes-256-gcm": (PASSPHRASE,)}.get(str(kind), (None, PASSPHRASE))
