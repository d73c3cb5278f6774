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
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import safetensors.torch
from torch import Tensor

from fedkl.errors import ConfigError, FedKLError, KeyFileError, NewerFormatError, warn
from fedkl.federated.manifest import (
    REMEDY,
    VERSION,
    Manifest,
    is_ours,
    manifest_name,
    public_name,
    round_named,
    sealed,
    unsealed,
)
from fedkl.federated.private_files import ClientState, PrivateFiles
from fedkl.federated.simulation import Federation
from fedkl.files import read_file, remove_parts, write_atomically
from fedkl.parsing import parse_tensors
from fedkl.types import under

_MAX_MANIFEST = 2**28  # bytes; a million clients take a quarter
_MAX_PUBLIC = 2**34  # bytes of the server's file where its model is not known
_MAX_HEADER = 2**27  # bytes; safetensors allows for 10⁸
_Read = TypeVar("_Read")
_KEPT = "The last complete checkpoint is kept: make room, then the same command goes on from it."


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: Where they lie.
        passphrase: Encrypts the clients' keys, private states and optimizer states.
        keep: How many are kept; a damaged newest one falls back to the one before.
    """

    def __init__(self, folder: Path, *, passphrase: str, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep
        self._private = PrivateFiles(folder, passphrase=passphrase)

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
            places = self._private.write_changed(federation.clients, round)
            data = safetensors.torch.save(federation.server.snapshot())
            manifest = Manifest(
                version=VERSION,
                round=round,
                public=public_name(round),
                digest=hashlib.sha256(data).hexdigest(),
                clients=places,
                masks=self._private.write_masks(federation, round),
                workers=federation.workers,
                threads=federation.threads,
            )
            write_atomically(self._folder / manifest.public, data)
            write_atomically(self._folder / manifest_name(round), sealed(asdict(manifest)))
            self._private.remember(federation.clients, places)
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

        def read(path: Path) -> tuple[Manifest, dict[str, Tensor], dict[str, ClientState]]:
            manifest = self._read_manifest(path)
            if manifest.round > federation.training.rounds:
                raise ConfigError(f"{path}: later than the last round, {federation.training.rounds}.")
            public = self._read_public(manifest, federation)
            private = self._private.read(manifest, federation)
            self._private.restore_masks(manifest, federation)
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
            return manifest.round, under(self._read_tensors(manifest, limit=_MAX_PUBLIC), "state/")

        self._check_folder()
        return _first_sound(self._manifests(), read)[1]

    def _apply(
        self,
        federation: Federation,
        manifest: Manifest,
        public: dict[str, Tensor],
        private: dict[str, ClientState],
    ) -> None:
        federation.server.restore(public)
        for client in federation.clients:
            client.restore(**private[client.name].__dict__)
        self._private.remember(federation.clients, manifest.clients)

    def _warn_about_threads(self, federation: Federation, manifest: Manifest) -> None:
        came, now = (manifest.workers, manifest.threads), (federation.workers, federation.threads)
        if came != now:
            warn(
                f"{self._folder}: written with {came[0]} workers on {came[1]} threads, resumed with {now[0]} "
                f"on {now[1]}: the last bits of the results may differ. Set OMP_NUM_THREADS={came[1]} and "
                f"execution.workers = {came[0]} to repeat them exactly."
            )

    def _check_folder(self) -> None:
        if self._folder.is_symlink():
            raise ConfigError(f"{self._folder}: expected a folder, got a symbolic link. {REMEDY}")

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
            raise ConfigError(f"{self._folder}: cannot be read ({error.strerror}). {REMEDY}") from error
        rounds = [round for name in names if (round := round_named(name)) is not None]
        return [self._folder / manifest_name(round) for round in sorted(rounds, reverse=True)]

    def _until(self, round: int) -> list[Path]:
        """The manifests up to a round that are files: nothing else must push one out."""
        found = [path for path in self._manifests() if path.is_file() and not path.is_symlink()]
        return [path for path in found if (round_named(path.name) or 0) <= round]

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
            if name not in used and is_ours(name):
                (self._folder / name).unlink()
        remove_parts(self._folder)

    def _read_manifest(self, path: Path) -> Manifest:
        try:
            manifest = unsealed(read_file(path, limit=_MAX_MANIFEST, follow=False), source=path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise ConfigError(f"{path}: a damaged checkpoint ({error}).") from error
        if path.name != manifest_name(manifest.round):
            raise ConfigError(f"{path}: the checkpoint of another round, {manifest.round}.")
        return manifest

    def _read_public(self, manifest: Manifest, federation: Federation) -> dict[str, Tensor]:
        server = federation.server
        limit = 4 * server.state_bytes + _MAX_HEADER  # an optimizer keeps at most two tensors for each
        tensors = self._read_tensors(manifest, limit=limit)
        try:
            server.check(tensors)
        except FedKLError as error:
            path = self._folder / manifest.public
            raise ConfigError(f"{path}: the checkpoint of another model or defense. {error}") from error
        return tensors

    def _read_tensors(self, manifest: Manifest, *, limit: int) -> dict[str, Tensor]:
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
            warn(f"{failure} The checkpoint before it, of round {round_named(path.name)}, is used instead.")
        return number, found
    if failures:
        raise failures[0]
    return 0, None
