"""Files of public tensors that a client's lock is loaded with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import fedkl
from fedkl import Key, modelfile
from tests.fuzzing.binaries import PASSPHRASE
from tests.fuzzing.contract import Finding
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import Surface


class Models(Surface):
    """`load_lock` with a file of public tensors; what is accepted is finite, and changes nothing private."""

    name = "models"
    form = "safetensors"
    quick = 300
    target = "fedkl.load_lock"

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        self._images = torch.linspace(-1, 1, 8).reshape(2, 4)
        self._lock = fedkl.lock(self._model, key=Key.generate(length=4))

    def seeds(self) -> list[bytes]:
        """One of fedkl, one of another program."""
        with tempfile.TemporaryDirectory() as folder:
            path, tensors = Path(folder) / "model", self._lock.public_state()
            modelfile.write_model(path, tensors, rounds=3)
            ours = path.read_bytes()
            return [ours, ours.replace(b"fedkl-model-1", b"pt-and-others")]

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Loads a lock with it."""
        path, lock = sandbox.place / "model.safetensors", sandbox.place / "client.lock"
        path.write_bytes(data)
        self._lock.save(lock, passphrase=PASSPHRASE)
        private = self._lock.private_state()
        loaded = fedkl.load_lock(lock, self._model, passphrase=PASSPHRASE, public=path)
        if any(not torch.equal(tensor, private[name]) for name, tensor in loaded.private_state().items()):
            raise Finding("public tensors have changed private ones")
        if not all(tensor.isfinite().all() for tensor in loaded.public_state().values()):
            raise Finding("a public tensor of an accepted file is not finite")
        loaded.model.eval()(self._images)
