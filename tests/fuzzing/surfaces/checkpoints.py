"""Checkpoints of a federation: manifests, the server's file, the clients' files."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkl.data import Dataset, DataSpec
from fedkl.defenses import KeyLock
from fedkl.errors import FedKLError
from fedkl.federated import Checkpoints, Execution, FederatedTraining, Federation, LocalTraining, ServerAdam
from tests.fuzzing import trees
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.binaries import PASSPHRASE, opened
from tests.fuzzing.contract import Finding
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import ArchiveSurface
from tests.fuzzing.tensors import read_safetensors

_ROUNDS = 4
_KEY_LENGTH = 4
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
_TRAINED = 3  # one input in so many also trains a round: it takes longer than all the rest


class _Net(nn.Module):
    """Its norm is locked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def _dataset() -> Dataset:
    spec = DataSpec(name="toy", shape=(1, 4, 4), classes=2, mean=(0.5,), std=(0.3,))
    images, labels = torch.linspace(0, 1, 128).reshape(8, 1, 4, 4), torch.arange(8) % 2
    return Dataset(
        spec, train_images=images, train_labels=labels, test_images=images[:2], test_labels=labels[:2]
    )


class FederatedCheckpoints(ArchiveSurface):
    """`Checkpoints.newest_public_state` and `restore`; what was restored fits, and trains on."""

    name = "checkpoints"
    precious = ("notes.txt",)
    confined = True
    quick = 110
    target = "fedkl.federated.Checkpoints.restore"

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._model = _Net()
        self._dataset = _dataset()
        self._reused: Federation | None = None
        self._start: dict[str, Any] = {}

    def _federation(self) -> Federation:
        local = LocalTraining(optimizer="adam", batch_size=4, keep_optimizer=True)
        training = FederatedTraining(
            clients=2, rounds=_ROUNDS, local=local, server=ServerAdam(), eval_every=_ROUNDS
        )
        return Federation(
            self._model,
            defense=KeyLock(key_length=_KEY_LENGTH),
            dataset=self._dataset,
            training=training,
            seed=0,
            execution=Execution(workers=1),
        )

    def load(self) -> None:
        """What the first optimizer imports takes seconds."""
        importlib.import_module("torch._dynamo")

    def seeds(self) -> list[bytes]:
        """After the first rounds, with what is kept after each."""
        with tempfile.TemporaryDirectory() as folder:
            place, federation = Path(folder), self._federation()
            store = Checkpoints(place, passphrase=PASSPHRASE)
            store.save(federation, round=0)
            seeds = [_files(place)]
            for number in range(2):
                federation.run_round(number)
                store.save(federation, round=number + 1)
                seeds.append(_files(place))
        return [packed(files) for files in seeds]

    def form_of(self, name: str) -> str:
        """Manifests hold a digest of themselves."""
        return "manifest" if name.endswith(".json") else super().form_of(name)

    def repaired(self, files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
        """Manifests mostly name the digest that the server's file has."""
        if rng.random() < 0.8:
            manifests = {name: _with_digest(c, files) for name, c in files.items() if name.endswith(".json")}
            files.update(manifests)
        return files

    def _fresh(self) -> Federation:
        """A federation as it is before its first round: building one takes longer than restoring one."""
        federation, self._reused = self._reused, None  # a finding leaves it in an unknown state
        if federation is None:
            federation = self._federation()
            kept = ("key", "private_state", "optimizer_state", "rounds")
            clients = [{name: getattr(client, name) for name in kept} for client in federation.clients]
            self._start = {"server": federation.server.snapshot(), "clients": clients}
        federation.server.restore(self._start["server"])
        for client, state in zip(federation.clients, self._start["clients"], strict=True):
            client.restore(**state)
        return federation

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Restores, checks what is in the federation now, and goes on."""
        sandbox.write(unpacked(data))
        federation = self._fresh()
        try:
            self._use(federation, data, sandbox)
        except FedKLError:
            self._reused = federation
            raise
        self._reused = federation

    def _use(self, federation: Federation, data: bytes, sandbox: Sandbox) -> None:
        files = unpacked(data)
        before = _specs(federation)
        store = Checkpoints(sandbox.place, passphrase=PASSPHRASE)
        self.attempt(store.newest_public_state)
        number = store.restore(federation)
        if number is None:
            return
        if type(number) is not int or number < 0:
            raise Finding(f"a round that is none was restored: {type(number).__name__}")
        _check(federation, before, _specs_in(files, number))
        if number < _ROUNDS and zlib.crc32(data) % _TRAINED == 0:
            federation.run_round(number)
            store.save(federation, round=number + 1)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _with_digest(manifest: bytes, files: dict[str, bytes]) -> bytes:
    try:
        values = json.loads(manifest)
        values["digest"] = hashlib.sha256(files[values["public"]]).hexdigest()
        return trees.sealed(json.dumps(values).encode())
    except (ValueError, KeyError, TypeError, RecursionError, IndexError):
        return manifest


def _specs(federation: Federation) -> dict[str, Any]:
    """Shapes and dtypes of what a federation has, by the names that they have in a checkpoint."""
    tensors = {f"state/{name}": tensor for name, tensor in federation.server.state.items()}
    for client in federation.clients:
        tensors |= {f"{client.name}/private/{name}": t for name, t in client.private_state.items()}
    return {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def _specs_in(files: dict[str, bytes], number: int) -> dict[str, Any]:
    """The same of a checkpoint's files, read by other code than the package's."""
    try:
        manifest = json.loads(files[f"round-{number:06d}.json"])
        plain = [files[manifest["public"]]]
        plain += [found[1] for name in set(manifest["clients"].values()) if (found := opened(files[name]))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    entries = [entry for data in plain for entry in (read_safetensors(data) or (None, []))[1]]
    return {entry.name: (entry.dtype, entry.shape) for entry in entries}


def _check(federation: Federation, before: dict[str, Any], came: dict[str, Any]) -> None:
    """Raises a Finding for what was made to fit, and for clients that could not go on."""
    if _specs(federation) != before:
        raise Finding("a checkpoint has changed the shape or dtype of a tensor")
    if any(came.get(name, spec) != spec for name, spec in before.items()):
        raise Finding("a tensor of another shape or dtype was made to fit")
    for client in federation.clients:
        if type(client.rounds) is not int or client.rounds < 0:
            raise Finding("a client has trained in a number of rounds that is none")
        if client.key is None or client.key.length != _KEY_LENGTH:
            raise Finding("a client has lost its key, or has one that does not fit")
