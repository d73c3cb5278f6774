"""Rounds on disk: a training that was killed at any instant goes on from its last complete checkpoint.

round-000012.json           what belongs to the checkpoint before round 12; written last
public-000012.safetensors   the server: public state and optimizer
private-000012-0.fedkl      clients that have changed since the checkpoint before, encrypted
masks-000012.fedkl          what the aggregation keeps, e.g. the members' keys, encrypted; only if it does

A client's state lies in the newest file that holds it, so a checkpoint of 10,000 clients, of whom ten have
trained, writes ten.

Other files in the folder are neither read nor removed, and links are not followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from fedkl import lockfile
from fedkl.errors import ConfigError, FedKLError, KeyFileError, NewerFormatError, gathered, shown, warn
from fedkl.federated.client import Client
from fedkl.federated.optimizer_state import (
    OptimizerState,
    flattened,
    misfits,
    slots_of,
    state_specs,
    unflattened,
)
from fedkl.federated.simulation import Federation
from fedkl.files import read_file, remove_parts, write_atomically
from fedkl.formats import check_version
from fedkl.keys import Key
from fedkl.parsing import parse_json_object, parse_tensors
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec

_VERSION = 1
_GROUP_BYTES = 64 * 2**20  # of private tensors in one file: bounds the memory that writing takes
_MAX_MANIFEST = 2**28  # bytes; a million clients take a quarter
_MAX_PUBLIC = 2**34  # bytes of the server's file where its model is not known
_MAX_HEADER = 2**27  # bytes; safetensors allows for 10⁸
_ROUND = r"([0-9]{6}|[1-9][0-9]{6,17})"
_MANIFEST = re.compile(rf"round-{_ROUND}\.json")
_PUBLIC = re.compile(rf"public-{_ROUND}\.safetensors")
_PRIVATE = re.compile(rf"private-{_ROUND}-[0-9]{{1,9}}\.fedkl")
_MASKS = re.compile(rf"masks-{_ROUND}\.fedkl")
_REMEDY = "Choose another --out, or remove the folder 'checkpoints' to start again."
_Read = TypeVar("_Read")
_KEPT = "The last complete checkpoint is kept: make room, then the same command goes on from it."


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """One checkpoint.

    Attributes:
        version: Of this format.
        round: The round that comes next.
        public: Name of the server's file.
        digest: SHA-256 of the server's file.
        clients: Name of the private file by client.
        masks: Name of the aggregation's file; empty if it keeps nothing.
        workers: How the clients were run; the last bits of results depend on it.
        threads: The same for PyTorch's threads.
    """

    version: int
    round: int
    public: str
    digest: str
    clients: dict[str, str]
    masks: str
    workers: int
    threads: int


_KINDS = {
    "version": int,
    "round": int,
    "public": str,
    "digest": str,
    "clients": dict,
    "masks": str,
    "workers": int,
    "threads": int,
}


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
        self._saved: dict[str, int] = {}  # revision of each client that the files hold

    def save(self, federation: Federation, *, round: int) -> None:
        """Writes a checkpoint; it counts from the moment its manifest is there.

        Args:
            federation: As it is before `round`.
            round: The round that comes next.

        Raises:
            ConfigError: The folder cannot be written, or is a link.
        """
        self._check_folder()
        with self._writing():
            places = self._places | self._write_changed(federation.clients, round)
            data = safetensors.torch.save(federation.server.snapshot())
            manifest = _Manifest(
                version=_VERSION,
                round=round,
                public=_public_name(round),
                digest=hashlib.sha256(data).hexdigest(),
                clients=places,
                masks=self._write_masks(federation, round),
                workers=federation.workers,
                threads=federation.threads,
            )
            write_atomically(self._folder / manifest.public, data)
            write_atomically(self._folder / _manifest_name(round), _sealed(asdict(manifest)))
            self._remember(federation.clients, places)
            self._collect(self._until(round)[: self._keep])

    def restore(self, federation: Federation, *, going_on: bool = True) -> int | None:
        """Puts the newest sound checkpoint into a federation of the same configuration.

        A damaged one is passed over with a warning, and removed with everything after it.

        Args:
            federation: What it is put into.
            going_on: Whether the training goes on from there. If not, nothing in the folder is removed, and
                it does not matter on how many threads it was written.

        Returns:
            The round that comes next; None if there is no checkpoint.

        Raises:
            FedKLError: There are checkpoints, but none that fits and can be read, e.g. with this passphrase;
                or the folder is a link. The federation is as it was.
        """

        def read(path: Path) -> tuple[_Manifest, dict[str, Tensor], dict[str, _ClientState]]:
            manifest = self._read_manifest(path)
            if manifest.round > federation.training.rounds:
                raise ConfigError(f"{path}: later than the last round, {federation.training.rounds}.")
            public = self._read_public(manifest, federation)
            private = self._read_private(manifest, federation)
            self._restore_masks(manifest, federation)
            return manifest, public, private

        self._check_folder()
        manifests = self._manifests()
        number, found = _first_sound(manifests, read)
        if found is None:
            return None
        manifest, public, private = found
        self._apply(federation, manifest, public, private)
        if going_on:
            self._warn_about_threads(federation, manifest)
            with self._writing():
                self._collect(manifests[number : number + self._keep])
        return manifest.round

    def newest_public_state(self) -> tuple[int, dict[str, Tensor]] | None:
        """The server's part of the newest sound checkpoint; it takes no passphrase and changes nothing.

        Returns:
            The number of rounds behind it and the public state; None if there is no checkpoint.

        Raises:
            FedKLError: There are checkpoints, but none can be read; or the folder is a link.
        """

        def read(path: Path) -> tuple[int, dict[str, Tensor]]:
            manifest = self._read_manifest(path)
            return manifest.round, _part("state", self._read_tensors(manifest, limit=_MAX_PUBLIC))

        self._check_folder()
        return _first_sound(self._manifests(), read)[1]

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

    def _warn_about_threads(self, federation: Federation, manifest: _Manifest) -> None:
        came, now = (manifest.workers, manifest.threads), (federation.workers, federation.threads)
        if came != now:
            warn(
                f"{self._folder}: written with {came[0]} workers on {came[1]} threads, resumed with {now[0]} "
                f"on {now[1]}: the last bits of the results may differ. Set OMP_NUM_THREADS={came[1]} and "
                f"execution.workers = {came[0]} to repeat them exactly."
            )

    def _remember(self, clients: Sequence[Client], places: dict[str, str]) -> None:
        self._places = dict(places)
        self._saved = {client.name: client.revision for client in clients}

    def _check_folder(self) -> None:
        if self._folder.is_symlink():
            raise ConfigError(f"{self._folder}: expected a folder, got a symbolic link. {_REMEDY}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be written ({error.strerror}). {_KEPT}") from error
        except KeyFileError as error:
            raise ConfigError(f"{error} {_KEPT}") from error

    def _manifests(self) -> list[Path]:
        """The newest first; a link or a folder can have such a name too, and is refused when it is read."""
        try:
            names = [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be read ({error.strerror}). {_REMEDY}") from error
        rounds = [int(match[1]) for name in names if (match := _MANIFEST.fullmatch(name))]
        return [self._folder / _manifest_name(round) for round in sorted(rounds, reverse=True)]

    def _until(self, round: int) -> list[Path]:
        """The manifests up to a round that are files: nothing else must push one out."""
        found = [path for path in self._manifests() if path.is_file() and not path.is_symlink()]
        return [path for path in found if _round_of(path) <= round]

    def _collect(self, kept: Sequence[Path]) -> None:
        """Removes our files that none of these manifests names, and what killed writes have left."""
        used = {path.name for path in kept}
        for path in kept:
            with contextlib.suppress(FedKLError):  # a damaged one holds nothing back
                manifest = self._read_manifest(path)
                used |= {manifest.public, manifest.masks, *manifest.clients.values()}
        with os.scandir(self._folder) as entries:
            found = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        for name in found:
            if name not in used and any(p.fullmatch(name) for p in (_MANIFEST, _PUBLIC, _PRIVATE, _MASKS)):
                (self._folder / name).unlink()
        remove_parts(self._folder)

    def _read_manifest(self, path: Path) -> _Manifest:
        try:
            manifest = _unsealed(read_file(path, limit=_MAX_MANIFEST, follow=False), source=path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise ConfigError(f"{path}: a damaged checkpoint ({error}).") from error
        if path.name != _manifest_name(manifest.round):
            raise ConfigError(f"{path}: the checkpoint of another round, {manifest.round}.")
        return manifest

    def _read_public(self, manifest: _Manifest, federation: Federation) -> dict[str, Tensor]:
        server = federation.server
        limit = 4 * server.state_bytes + _MAX_HEADER  # an optimizer keeps at most two tensors for each
        tensors = self._read_tensors(manifest, limit=limit)
        try:
            server.check(tensors)
        except FedKLError as error:
            path = self._folder / manifest.public
            raise ConfigError(f"{path}: the checkpoint of another model or defense. {error}") from error
        return tensors

    def _read_tensors(self, manifest: _Manifest, *, limit: int) -> dict[str, Tensor]:
        """What the server's file holds, which is the one that was written with its manifest."""
        path = self._folder / manifest.public
        try:
            data = read_file(path, limit=limit, follow=False)
            if hashlib.sha256(data).hexdigest() != manifest.digest:
                raise ConfigError(f"{path}: not the file that its checkpoint was written with.")
            return parse_tensors(data)[0]
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{path}: missing or damaged ({reason}).") from error

    def _write_changed(self, clients: Sequence[Client], round: int) -> dict[str, str]:
        """Writes the clients that the files do not hold as they are; returns where each of them is now."""
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
        return places

    def _write_masks(self, federation: Federation, round: int) -> str:
        """Writes what the aggregation keeps; returns the file's name, empty if it keeps nothing."""
        tensors = federation.aggregation.secrets
        if not tensors:
            return ""
        name = _masks_name(round)
        self._write_secret(self._folder / name, meta={"file": name}, tensors=tensors)
        return name

    def _restore_masks(self, manifest: _Manifest, federation: Federation) -> None:
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

    def _read_private(self, manifest: _Manifest, federation: Federation) -> dict[str, _ClientState]:
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


def _first_sound(
    manifests: Sequence[Path], read: Callable[[Path], _Read]
) -> tuple[int, _Read] | tuple[int, None]:
    """Reads the first of the checkpoints, the newest first, that can be read; warns of those before it.

    Returns:
        Its place, and what was read; None if there are none.

    Raises:
        FedKLError: There are some, but none can be read.
    """
    failures: list[FedKLError] = []
    for number, path in enumerate(manifests):
        try:
            found = read(path)
        except NewerFormatError:  # an older checkpoint would be gone on from, and this one replaced
            raise
        except FedKLError as error:
            failures.append(error)
            continue
        for failure in failures:
            warn(f"{failure} The checkpoint before it, of round {_round_of(path)}, is used instead.")
        return number, found
    if failures:
        raise failures[0]
    return 0, None


@dataclass(frozen=True, kw_only=True, repr=False)
class _ClientState:
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
    ) -> _ClientState:
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
            raise ConfigError(gathered(subject, problems, _REMEDY))
        secret = _part("secret", tensors)
        return _ClientState(
            key=lockfile.key_of(self.path, facts, secret) if secret else None,
            private_state=_part("private", tensors),
            optimizer_state=unflattened(_part("optimizer", tensors)),
            rounds=rounds,
        )


def _read_secret(path: Path, *, passphrase: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an encrypted file of a checkpoint holds: metadata and tensors; links are not followed."""
    if path.is_symlink():
        raise ConfigError(f"{path}: expected a file, got a symbolic link.")
    return lockfile.read(path, kind="checkpoint", passphrase=passphrase)


def _part(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        place.removeprefix(f"{part}/"): tensor
        for place, tensor in tensors.items()
        if place.startswith(f"{part}/")
    }


def _specs(
    client: Client, tensors: Mapping[str, Tensor], trained: Mapping[str, TensorSpec], slots: Sequence[str]
) -> dict[str, TensorSpec]:
    """What a client's tensors in a file must be."""
    moments = state_specs(_part("optimizer", tensors), named=trained, slots=slots)
    specs = {f"private/{name}": spec for name, spec in client.private_specs.items()}
    specs |= {f"optimizer/{place}": spec for place, spec in moments.items()}
    if client.key is not None:
        specs["secret/key"] = TensorSpec(shape=(client.key.length,), dtype=torch.float64)
    return specs


def _manifest_name(round: int) -> str:
    return f"round-{round:06d}.json"


def _round_of(manifest: Path) -> int:
    return int(manifest.stem.removeprefix("round-"))


def _masks_name(round: int) -> str:
    return f"masks-{round:06d}.fedkl"


def _public_name(round: int) -> str:
    return f"public-{round:06d}.safetensors"


def _sealed(values: dict[str, Any]) -> bytes:
    """JSON with a digest of itself: a flipped bit may well name another round, or a file that exists."""
    return json.dumps({"sha256": _digest(values), **values}).encode()


def _unsealed(data: bytes, *, source: Path) -> _Manifest:
    """What `_sealed` was given.

    Raises:
        ValueError: It is damaged, or not what `Checkpoints` writes.
        NewerFormatError: A newer fedkl wrote it.
    """
    values = parse_json_object(data)
    digest = values.pop("sha256", None)
    check_version(values.get("version"), source=source, reads=_VERSION)
    if values.get("version") != _VERSION:
        raise ValueError(f"of version {shown(values.get('version'))}, expected {_VERSION}")
    found = {"masks": ""} | values  # earlier ones had none
    _check_manifest(found)
    if digest != _digest(values):
        raise ValueError("it was altered")
    return _Manifest(**found)


def _check_manifest(values: dict[str, Any]) -> None:
    """Raises ValueError for files but our own, or of a later round: no others are ever opened or removed."""
    if values.keys() != _KINDS.keys() or any(type(values[n]) is not kind for n, kind in _KINDS.items()):
        raise ValueError(f"expected the fields {', '.join(_KINDS)}")
    round = values["round"]
    if not 0 <= round < 10**18:
        raise ValueError("expected a round from 0 to 10¹⁸")
    if values["public"] != _public_name(round):
        raise ValueError(f"round {round} cannot have the file {shown(values['public'])}")
    if values["masks"] not in ("", _masks_name(round)):
        raise ValueError(f"round {round} cannot have the file {shown(values['masks'])}")
    for name in values["clients"].values():
        match = _PRIVATE.fullmatch(name) if isinstance(name, str) else None
        if match is None or int(match[1]) > round:
            raise ValueError(f"round {round} cannot have the file {shown(name)}")


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
