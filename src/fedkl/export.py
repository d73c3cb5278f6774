"""The trained model gets out: of a run directory of a training, or of a Flower server's folder of rounds.

What the server has are the public tensors. A client's model is these and what it keeps, e.g. its lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

from fedkl import serving
from fedkl.defenses import Defense
from fedkl.errors import ConfigError, FedKLError, shown, warn
from fedkl.federated import Checkpoints, Federation
from fedkl.files import PRIVATE_FILE
from fedkl.locking import Lock, Split
from fedkl.masking import MemberFile
from fedkl.modelfile import PUBLIC_MODE, check_finite, read_model, write_model
from fedkl.passphrases import default_passphrase
from fedkl.runs import RunDirectory, is_run
from fedkl.training import restored, training_of, training_summary

_ROUNDS = "round-*.fedkl"  # of a Flower server; see `fedkl.flower.round_files`

Form = Literal["state", "torch", "onnx"]
"""How a client's own model is written: its tensors, a program of PyTorch, or ONNX; see `fedkl.serving`."""

State = tuple[int, dict[str, Tensor]]
"""A number of rounds, and the public tensors after them."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
        model: The file of the public tensors.
        rounds: How many rounds of training they have behind them.
        lock: The file of the client's lock; None if none was asked for.
        whole: Whether the public tensors are the trained plain network; if not, clients keep some of their
            own, or the defense changes the network. None: a Flower server does not know.
        read_by_server: Whether the training's server could read them.
    """

    model: Path
    rounds: int
    lock: Path | None = None
    whole: bool | None = None
    read_by_server: bool = True


class _Facts(TypedDict):
    """Fields of `Exported` that follow from a training's configuration."""

    whole: bool | None
    read_by_server: bool


def export(
    source: str | Path,
    *,
    out: str | Path,
    client: str | None = None,
    member: MemberFile | None = None,
    replace: bool = False,
) -> Exported:
    """Writes the newest public tensors of a training to a model file, and one client's lock beside it.

    What is damaged gives way to the checkpoint before it, with a warning. Nothing in the source is changed.

    Args:
        source: A run directory of a training, finished or not, or a Flower server's folder of rounds.
        out: The model file; mode 0600 where members alone can read the source.
        client: Of a run directory: whose lock is written too, as ``<client>.lock`` beside `out`, encrypted
            with the passphrase of the run's checkpoints. Model and lock are of the same round then.
        member: Of a Flower server's rounds with masks that the server cannot read: whoever opens their sum.
        replace: Whether files that are there are replaced.

    Returns:
        What was written.

    Raises:
        FedKLError: The source is neither, holds no training that can be read, or has no such client; its
            clients have no locks; or a file is there already or cannot be written.
    """
    source, out = Path(source), Path(out)
    lock: Lock | None = None
    sealed = False
    if not is_run(source):
        if client is not None:
            raise ConfigError(
                f"{source}: a Flower server has no locks. Each is in the store of its own node."
            )
        rounds, state, sealed = _state_of_server(source, member)
    elif client is None:
        rounds, state = _state_of_run(RunDirectory.open(source))
    else:
        lock, rounds = _lock_of(source, client)
        state = lock.public_state()
    _check_trained(source, rounds)
    path = None if lock is None else out.with_name(f"{client}.lock")
    _check_free(out, path, replace=replace)
    mode = PRIVATE_FILE if sealed else PUBLIC_MODE  # what the server cannot read is the cohort's
    write_model(out, state, rounds=rounds, replace=replace, mode=mode)
    if lock is not None and path is not None:
        about = {"client": str(client)}
        lock.save(path, passphrase=default_passphrase(), about=about, replace=replace)
    facts = _facts(source)
    facts["read_by_server"] &= not sealed
    return Exported(model=out, rounds=rounds, lock=path, **facts)


def export_client(
    source: str | Path, *, out: str | Path, client: str, form: Form, replace: bool = False
) -> int:
    """Writes one client's own trained model to one file, for that client to serve; see `fedkl.serving`.

    Args:
        source: A run directory of a training, finished or not. Nothing in it is changed.
        out: The file, mode 0600.
        client: Whose, e.g. ``client-0``.
        form: As what.
        replace: Whether a file that is there is replaced.

    Returns:
        How many rounds of training the model has behind it.

    Raises:
        FedKLError: As for `client_of`; nothing is trained here yet; PyTorch cannot write the model so; or the
            file is there already or cannot be written.
    """
    federation, rounds = _client(Path(source), client)
    _check_trained(Path(source), rounds)
    split, images = federation.split, torch.zeros(2, *federation.dataset.spec.shape)
    match form:
        case "state":
            serving.save_state(split, out, client=client, replace=replace)
        case "torch":
            serving.save_program(split, out, client=client, example_inputs=images, replace=replace)
        case "onnx":
            serving.save_onnx(split, out, client=client, example_inputs=images, replace=replace)
    return rounds


def public_tensors(source: str | Path, *, member: MemberFile | None = None) -> dict[str, Tensor]:
    """The newest public tensors of a training, wherever they lie.

    Args:
        source: A model file, a run directory of a training, or a Flower server's folder of rounds.
        member: As for `export`.

    Raises:
        FedKLError: It is none of these, or holds nothing trained that can be read.
    """
    source = Path(source)
    if not source.is_dir():
        return read_model(source)
    if is_run(source):
        rounds, state = _state_of_run(RunDirectory.open(source))
    else:
        rounds, state, _ = _state_of_server(source, member)
    _check_trained(source, rounds)
    return state


def defense_of(source: str | Path) -> Defense | None:
    """What the clients of a run directory's training have; None of other sources, which do not say."""
    return training_of(RunDirectory.open(Path(source))).defense if is_run(Path(source)) else None


def _check_trained(source: Path, rounds: int) -> None:
    if rounds == 0:
        raise ConfigError(f"{source}: nothing is trained here yet. Let it train a round first.")


def _facts(source: Path) -> _Facts:
    """What a run's configuration says of its public tensors; a Flower server does not know."""
    if not is_run(source):
        return {"whole": None, "read_by_server": True}
    config = training_of(RunDirectory.open(source))
    return {
        "whole": not (config.defense.keeps_tensors or config.defense.changes_network),
        "read_by_server": config.training.aggregation.server_learns != "nothing",
    }


def _check_free(out: Path, lock: Path | None, *, replace: bool) -> None:
    """Checks both places before the first file is written.

    Raises:
        ConfigError: They are one, or a file is there and is not to be replaced.
    """
    if lock == out:
        raise ConfigError(f"{out}: the client's lock has this name. Choose another one for the model.")
    for path in (out, lock):
        if path is not None and not replace and os.path.lexists(path):
            raise ConfigError(f"{path}: exists already. Choose another path, or let it be replaced.")


def client_of(source: str | Path, name: str) -> Split:
    """One client of a training as the newest sound checkpoint has it, whatever the defense keeps on clients.

    Its ``model`` is the client's trained model, in eval mode. The training's images are needed: they say what
    network it has, and its private norm statistics are counted anew over the client's own (unless the
    training is of ``norm_statistics = "kept"``).

    Args:
        source: The training's run directory.
        name: The client, e.g. ``client-0``.

    Raises:
        FedKLError: The folder holds no training, or no checkpoint that can be read with this machine's
            passphrase; it has no such client; or its images are not there.
    """
    return _client(Path(source), name)[0].split


def _client(source: Path, name: str) -> tuple[Federation, int]:
    federation, rounds = restored(RunDirectory.open(source))
    clients = {client.name: client for client in federation.clients}
    if name not in clients:
        raise ConfigError(
            f"{source}: no client {shown(name)}. Choose one from client-0 to client-{len(clients) - 1}."
        )
    federation.use(clients[name])
    return federation, rounds


def _lock_of(source: Path, name: str) -> tuple[Lock, int]:
    federation, rounds = _client(source, name)
    split = federation.split
    if isinstance(split, Lock):
        return split, rounds
    reason = f"{source}: clients of this training have no locks."
    if not split.private_names:
        raise ConfigError(f"{reason} They keep nothing: the public tensors are their model.")
    own = f"fedkl.export.client_of({str(source)!r}, {name!r}).model"
    raise ConfigError(f"{reason} In Python, {own} is this client's model.")


def _state_of_run(run: RunDirectory) -> State:
    """The result of a finished training, or else its newest sound checkpoint."""
    training_of(run)
    steps: list[Callable[[], State | None]] = [
        lambda: _final_state(run),
        lambda: Checkpoints(run.path / "checkpoints", passphrase="").newest_public_state(),  # needs none
    ]
    failures: list[FedKLError] = []
    for step in steps:
        try:
            found = step()
            if found is not None:
                check_finite(found[1], subject=f"{run.path}: not a trained model.")
        except FedKLError as error:
            failures.append(error)
            continue
        if found is not None:
            for failure in failures:
                warn(f"{failure} The checkpoint of round {found[0]} is used instead.")
            return found
    if failures:
        raise failures[0]
    return 0, {}


def _final_state(run: RunDirectory) -> State | None:
    summary = training_summary(run)
    return None if summary is None else (summary["rounds"], run.load_tensors("global"))


def _state_of_server(folder: Path, member: MemberFile | None) -> tuple[int, dict[str, Tensor], bool]:
    """Rounds, public tensors, and whether the server could not read them."""
    neither = ConfigError(
        f"{folder}: expected the run directory of a training, or a Flower server's folder of rounds "
        "(round-000001.fedkl and so on)."
    )
    try:
        if not any(folder.glob(_ROUNDS)):
            raise neither
    except (OSError, ValueError) as error:
        raise neither from error
    from fedkl.flower import kept_sums  # the only part that needs Flower
    from fedkl.flower.round_files import RoundFiles

    saved = RoundFiles(folder).newest()
    if saved is None:
        raise neither
    if not kept_sums.is_sealed(saved):
        return saved.round, dict(saved.arrays), False
    if member is None:
        raise ConfigError(
            f"{folder}: the sum in it is masked, and only members can open it. Take the folder to a member's "
            "machine, and give the secret file with --member. Or take the model that every node has written "
            "down at the end, beside its secret file."
        )
    return saved.round, kept_sums.opened_by(member, saved), True
