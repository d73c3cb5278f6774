"""Rounds on disk: a training that was killed at any instant goes on from its last complete checkpoint.

round-000012.json           what belongs to the checkpoint before round 12; written last
public-000012.safetensors   the server: public state and optimizer
private-000012-0.fedkl      clients that have changed since the checkpoint before, encrypted

A client's state lies in the newest file that holds it, so a checkpoint of 10,000 clients, of whom ten have
trained, writes ten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fedkl import lockfile
from fedkl.errors import ConfigError, FedKLError, KeyFileError, warn
from fedkl.federated.client import Client
from fedkl.federated.optimizer_state import OptimizerState, flattened, unflattened
from fedkl.federated.simulation import Federation
from fedkl.files import write_atomically
from fedkl.keys import Key

_VERSION = 1
_GROUP_BYTES = 64 * 2**20  # of private tensors in one file: bounds the memory that writing takes


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """One checkpoint.

    Attributes:
        version: Of this format.
        round: The round that comes next.
        public: Name of the server's file.
        digest: SHA-256 of the server's file.
        clients: Name of the private file by client.
        workers: How the clients were run; the last bits of results depend on it.
        threads: The same for PyTorch's threads.
    """

    version: int
    round: int
    public: str
    digest: str
    clients: dict[str, str]
    workers: int
    threads: int


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: Where they lie.
        passphrase: Encrypts the clients' keys, private states and optimizer states.
        keep: How many are kept; a damaged newest one falls back to the one before.
    """

    def __init__(self, folder: Path, *, passphrase: str, keep: int = 2) -> None:
        self._folder = folder
        self._passphrase = passphrase
        self._keep = keep
        self._salt = os.urandom(16)
        self._places: dict[str, str] = {}
        self._saved: dict[str, int] = {}  # rounds of each client that the files hold

    def save(self, federation: Federation, *, round: int) -> None:
        """Writes a checkpoint; it counts from the moment its manifest is there.

        Args:
            federation: As it is before `round`.
            round: The round that comes next.

        Raises:
            ConfigError: The folder cannot be written.
        """
        try:
            places = self._places | self._write_changed(federation.clients, round)
            data = safetensors.torch.save(federation.server.snapshot())
            manifest = _Manifest(
                version=_VERSION,
                round=round,
                public=f"public-{round:06d}.safetensors",
                digest=hashlib.sha256(data).hexdigest(),
                clients=places,
                workers=federation.workers,
                threads=federation.threads,
            )
            write_atomically(self._folder / manifest.public, data)
            write_atomically(self._folder / _manifest_name(round), _sealed(asdict(manifest)))
            self._remember(federation.clients, places)
            self._collect(self._manifests()[: self._keep])
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be written ({error.strerror}).") from error
        except KeyFileError as error:
            raise ConfigError(str(error)) from error

    def restore(self, federation: Federation) -> int | None:
        """Puts the newest sound checkpoint into a federation of the same configuration.

        A damaged one is passed over with a warning, and removed with everything after it.

        Returns:
            The round that comes next; None if there is no checkpoint.

        Raises:
            FedKLError: There are checkpoints, but none that can be read, e.g. with this passphrase.
        """
        failures: list[FedKLError] = []
        manifests = self._manifests()
        for number, path in enumerate(manifests):
            try:
                manifest = self._read_manifest(path)
                public = self._read_public(manifest)
                private = self._read_private(manifest, federation)
            except FedKLError as error:
                failures.append(error)
                continue
            for failure in failures:
                warn(f"{failure} The checkpoint before it, of round {manifest.round}, is used instead.")
            self._apply(federation, manifest, public, private)
            self._collect(manifests[number : number + self._keep])
            return manifest.round
        if failures:
            raise failures[0]
        return None

    def _apply(
        self,
        federation: Federation,
        manifest: _Manifest,
        public: dict[str, Tensor],
        private: dict[str, _ClientState],
    ) -> None:
        federation.server.restore(public)
        for client in federation.clients:
            client.restore(**private[client.name].__dict__)
        self._remember(federation.clients, manifest.clients)
        came, now = (manifest.workers, manifest.threads), (federation.workers, federation.threads)
        if came != now:
            warn(
                f"{self._folder}: written with {came[0]} workers on {came[1]} threads, resumed with {now[0]} "
                f"on {now[1]}: the last bits of the results may differ. Set OMP_NUM_THREADS={came[1]} and "
                f"execution.workers = {came[0]} to repeat them exactly."
            )

    def _remember(self, clients: Sequence[Client], places: dict[str, str]) -> None:
        self._places = dict(places)
        self._saved = {client.name: client.rounds for client in clients}

    def _manifests(self) -> list[Path]:
        """The newest first."""
        return sorted(self._folder.glob("round-*.json"), reverse=True)

    def _collect(self, kept: Sequence[Path]) -> None:
        """Removes all files that none of these manifests names, what killed writes have left included."""
        used = {path.name for path in kept}
        for path in kept:
            with contextlib.suppress(FedKLError):  # a damaged one holds nothing back
                manifest = self._read_manifest(path)
                used |= {manifest.public, *manifest.clients.values()}
        for path in self._folder.iterdir():
            if path.name not in used and path.is_file():
                path.unlink()

    def _read_manifest(self, path: Path) -> _Manifest:
        try:
            values = _unsealed(path.read_bytes())
            if values["version"] != _VERSION:
                raise ConfigError(f"{path}: a checkpoint of another version of fedkl.")
            manifest = _Manifest(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: a damaged checkpoint.") from error
        if path.name != _manifest_name(manifest.round):
            raise ConfigError(f"{path}: the checkpoint of another round, {manifest.round}.")
        return manifest

    def _read_public(self, manifest: _Manifest) -> dict[str, Tensor]:
        path = self._folder / manifest.public
        try:
            data = path.read_bytes()
            tensors = safetensors.torch.load(data)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: missing or damaged.") from error
        if hashlib.sha256(data).hexdigest() != manifest.digest:
            raise ConfigError(f"{path}: not the file that its checkpoint was written with.")
        return tensors

    def _write_changed(self, clients: Sequence[Client], round: int) -> dict[str, str]:
        """Writes the clients that the files do not hold as they are; returns where each of them is now."""
        again = f"private-{round:06d}-"  # files of this round are written anew, with all that they held
        changed = [
            client
            for client in clients
            if self._saved.get(client.name) != client.rounds
            or self._places.get(client.name, "").startswith(again)
        ]
        places: dict[str, str] = {}
        for number, group in enumerate(_groups(changed)):
            name = f"private-{round:06d}-{number}.fedkl"
            self._write_private(self._folder / name, group)
            places |= {client.name: name for client in group}
        return places

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
        lockfile.write(
            path, kind="checkpoint", meta=meta, tensors=tensors, passphrase=self._passphrase, salt=self._salt
        )

    def _read_private(self, manifest: _Manifest, federation: Federation) -> dict[str, _ClientState]:
        names = {client.name for client in federation.clients}
        if names != set(manifest.clients):
            raise ConfigError(
                f"{self._folder}: a checkpoint of {len(manifest.clients)} clients, expected {len(names)}."
            )
        states: dict[str, _ClientState] = {}
        for file in sorted(set(manifest.clients.values())):
            wanted = {name for name, place in manifest.clients.items() if place == file}
            path = self._folder / file
            states |= _client_states(
                path, wanted, *lockfile.read(path, kind="checkpoint", passphrase=self._passphrase)
            )
        for client in federation.clients:
            if states[client.name].private_state.keys() != client.private_names:
                raise ConfigError(
                    f"{self._folder}: the checkpoint of another model or defense: it keeps other tensors."
                )
        return states


@dataclass(frozen=True, kw_only=True, repr=False)
class _ClientState:
    """What a client keeps between rounds."""

    key: Key | None
    private_state: dict[str, Tensor]
    optimizer_state: OptimizerState
    rounds: int


def _client_states(
    path: Path, wanted: set[str], meta: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, _ClientState]:
    parts: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in wanted}
    for place, tensor in tensors.items():
        client, part, name = place.split("/", 2)
        if client in wanted:
            parts[client].setdefault(part, {})[name] = tensor
    missing = sorted(name for name in wanted if meta.get(name, {}).get("file") != path.name)
    if missing:
        raise KeyFileError(f"{path}: holds nothing of {', '.join(missing[:3])}, or was once another.")
    return {
        name: _ClientState(
            key=lockfile.key_of(path, meta[name], found["secret"]) if "secret" in found else None,
            private_state=found.get("private", {}),
            optimizer_state=unflattened(found.get("optimizer", {})),
            rounds=meta[name]["rounds"],
        )
        for name, found in parts.items()
    }


def _manifest_name(round: int) -> str:
    return f"round-{round:06d}.json"


def _sealed(values: dict[str, Any]) -> bytes:
    """JSON with a digest of itself: a flipped bit may well name another round, or a file that exists."""
    return json.dumps({"sha256": _digest(values), **values}).encode()


def _unsealed(data: bytes) -> dict[str, Any]:
    values: dict[str, Any] = dict(json.loads(data))
    if values.pop("sha256") != _digest(values):
        raise ValueError
    return values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
