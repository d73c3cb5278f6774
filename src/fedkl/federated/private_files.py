"""The encrypted files of checkpoints: what clients keep between rounds, and what the aggregation keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkl import lockfile
from fedkl.errors import ConfigError, KeyFileError, gathered
from fedkl.federated.client import Client
from fedkl.federated.manifest import REMEDY, Manifest, masks_name
from fedkl.federated.optimizer_state import (
    OptimizerState,
    flattened,
    misfits,
    slots_of,
    state_specs,
    unflattened,
)
from fedkl.federated.simulation import Federation
from fedkl.keyfile import key_of
from fedkl.keys import Key
from fedkl.types import NamedTensors, under
from fedkl.update import TensorSpec

_GROUP_BYTES = 64 * 2**20  # of private tensors in one file: bounds the memory that writing takes


class PrivateFiles:
    """The encrypted files of one training's checkpoints.

    Args:
        folder: Where they lie.
        passphrase: Encrypts them.
    """

    def __init__(self, folder: Path, *, passphrase: str) -> None:
        self._folder = folder
        self._passphrase = passphrase
        self._salt = os.urandom(16)
        self._places: dict[str, str] = {}
        self._saved: dict[str, int] = {}  # revision of each client that the files hold

    def remember(self, clients: Sequence[Client], places: dict[str, str]) -> None:
        """Notes that the files hold clients as they are, and where each of them is."""
        self._places = dict(places)
        self._saved = {client.name: client.revision for client in clients}

    def write_changed(self, clients: Sequence[Client], round: int) -> dict[str, str]:
        """Writes the clients that the files do not hold as they are; returns where every client is now."""
        again = f"private-{round:06d}-"  # files of this round are written anew, with all that they held
        changed = [
            client
            for client in clients
            if self._saved.get(client.name) != client.revision
            or self._places.get(client.name, "").startswith(again)
        ]
        places: dict[str, str] = {}
        for number, group in enumerate(_groups(changed)):
            name = f"private-{round:06d}-{number}.fedkl"
            self._write_private(self._folder / name, group)
            places |= {client.name: name for client in group}
        return self._places | places

    def write_masks(self, federation: Federation, round: int) -> str:
        """Writes what the aggregation keeps; returns the file's name, empty if it keeps nothing."""
        tensors = federation.aggregation.secrets
        if not tensors:
            return ""
        name = masks_name(round)
        self._write_secret(self._folder / name, meta={"file": name}, tensors=tensors)
        return name

    def restore_masks(self, manifest: Manifest, federation: Federation) -> None:
        """The last step that can fail: the aggregation checks what it takes over."""
        tensors: dict[str, Tensor] = {}
        if manifest.masks:
            path = self._folder / manifest.masks
            facts, tensors = _read_secret(path, passphrase=self._passphrase)
            if facts.get("file") != path.name:
                raise KeyFileError(f"{path}: was once another file.")
        federation.aggregation.restore(tensors)

    def _write_private(self, path: Path, clients: Sequence[Client]) -> None:
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        for client in clients:
            meta[client.name] = {"rounds": client.rounds, "file": path.name}
            parts = {"private": client.private_state, "optimizer": flattened(client.optimizer_state)}
            if client.key is not None:
                meta[client.name]["distribution"] = client.key.distribution
                parts["secret"] = {"key": client.key.reveal()}
            for part, named in parts.items():
                tensors |= {f"{client.name}/{part}/{name}": tensor for name, tensor in named.items()}
        self._write_secret(path, meta=meta, tensors=tensors)

    def _write_secret(self, path: Path, *, meta: dict[str, Any], tensors: NamedTensors) -> None:
        lockfile.write(
            path, kind="checkpoint", meta=meta, tensors=tensors, passphrase=self._passphrase, salt=self._salt
        )

    def read(self, manifest: Manifest, federation: Federation) -> dict[str, ClientState]:
        """What a checkpoint has of every client of a federation.

        Raises:
            FedKLError: A file is missing or damaged, does not open with the passphrase, or does not fit.
        """
        names = {client.name for client in federation.clients}
        if names != set(manifest.clients):
            raise ConfigError(
                f"{self._folder}: a checkpoint of {len(manifest.clients)} clients, expected {len(names)}."
            )
        parameters = federation.split.public_parameters() | federation.split.private_parameters()
        trained = {name: TensorSpec.of(parameter) for name, parameter in parameters.items()}
        local, states = federation.training.local, {}
        slots = slots_of(local.optimizer, momentum=local.momentum) if local.keep_optimizer else ()
        for file in sorted(set(manifest.clients.values())):
            held = _Held.read(self._folder / file, passphrase=self._passphrase)
            for client in federation.clients:
                if manifest.clients[client.name] == file:
                    states[client.name] = held.state_of(
                        client, last=manifest.round, trained=trained, slots=slots
                    )
        return states


def _groups(clients: Sequence[Client]) -> Iterator[list[Client]]:
    """Clients whose tensors make up one file each."""
    group: list[Client] = []
    size = 0
    for client in clients:
        group.append(client)
        named = [client.private_state, *client.optimizer_state.values()]
        size += sum(t.numel() * t.element_size() for tensors in named for t in tensors.values())
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@dataclass(frozen=True, kw_only=True, repr=False)
class ClientState:
    """What a client keeps between rounds."""

    key: Key | None
    private_state: dict[str, Tensor]
    optimizer_state: OptimizerState
    rounds: int


@dataclass(frozen=True, kw_only=True, repr=False)
class _Held:
    """What a private file holds: facts and tensors by client, the tensors as ``<part>/<name>``."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @classmethod
    def read(cls, path: Path, *, passphrase: str) -> _Held:
        facts, tensors = _read_secret(path, passphrase=passphrase)
        by_client: dict[str, dict[str, Tensor]] = {}
        for place, tensor in tensors.items():
            client, _, name = place.partition("/")
            by_client.setdefault(client, {})[name] = tensor
        return cls(path=path, facts=facts, tensors=by_client)

    def state_of(
        self, client: Client, *, last: int, trained: Mapping[str, TensorSpec], slots: Sequence[str]
    ) -> ClientState:
        """A client's state, which fits it exactly.

        Args:
            client: Whose.
            last: The most rounds that it can have trained in.
            trained: What its optimizer may have stepped.
            slots: What the optimizer keeps for each of them.

        Raises:
            FedKLError: The file holds nothing of this client, or what does not fit.
        """
        facts, tensors = self.facts.get(client.name), self.tensors.get(client.name, {})
        if not isinstance(facts, dict) or facts.get("file") != self.path.name:
            raise KeyFileError(f"{self.path}: holds nothing of {client.name}, or was once another.")
        rounds = facts.get("rounds")
        if type(rounds) is not int or not 0 <= rounds <= last:
            raise KeyFileError(f"{self.path}: {client.name} has no number of rounds from 0 to {last}.")
        problems = misfits(tensors, _specs(client, tensors, trained, slots if rounds else ()))
        if client.key is not None and facts.get("distribution") != client.key.distribution:
            problems.append(f"expected a key of distribution {client.key.distribution!r}")
        if problems:
            subject = f"{self.path}: the checkpoint of another model or defense; {client.name} does not fit."
            raise ConfigError(gathered(subject, problems, REMEDY))
        secret = under(tensors, "secret/")
        return ClientState(
            key=key_of(self.path, facts, secret) if secret else None,
            private_state=under(tensors, "private/"),
            optimizer_state=unflattened(under(tensors, "optimizer/")),
            rounds=rounds,
        )


def _read_secret(path: Path, *, passphrase: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an encrypted file of a checkpoint holds: metadata and tensors; links are not followed."""
    if path.is_symlink():
        raise ConfigError(f"{path}: expected a file, got a symbolic link.")
    return lockfile.read(path, kind="checkpoint", passphrase=passphrase)


def _specs(
    client: Client, tensors: Mapping[str, Tensor], trained: Mapping[str, TensorSpec], slots: Sequence[str]
) -> dict[str, TensorSpec]:
    """What a client's tensors in a file must be."""
    moments = state_specs(under(tensors, "optimizer/"), named=trained, slots=slots)
    specs = {f"private/{name}": spec for name, spec in client.private_specs.items()}
    specs |= {f"optimizer/{place}": spec for place, spec in moments.items()}
    if client.key is not None:
        specs["secret/key"] = TensorSpec(shape=(client.key.length,), dtype=torch.float64)
    return specs
