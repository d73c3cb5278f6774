"""`fedkl enroll`, and what `fedkl key rotate` does to a lock."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedkl.cli.commands import Command
from fedkl.cli.membership import store_passphrase, tell
from fedkl.errors import ConfigError

if TYPE_CHECKING:
    from fedkl.auditing import Subject
    from fedkl.custody import ClientStore
    from fedkl.enrollment import Enrolled, Fitting

StoreOption = Annotated[Path | None, typer.Option(help="A node's store (fedkl-store), with --client.")]
ClientOption = Annotated[str | None, typer.Option(help="The client's name in it (fedkl-client).")]
PassphraseFileOption = Annotated[
    Path | None,
    typer.Option(help="Holds the lock's passphrase.", show_default="FEDKL_PASSPHRASE, or this machine's"),
]
HeldOutOption = Annotated[
    float, typer.Option(min=0.01, max=0.9, help="Share of the images that tells when to stop.")
]
EpochsOption = Annotated[int, typer.Option(min=1, help="Of the fitting, at most.")]
RateOption = Annotated[float, typer.Option("--lr", help="Learning rate of the fitting.")]
SeedOption = Annotated[int, typer.Option(help="Of batches and of the held-out part; never of a secret.")]


class _EnrollmentCommand(Command):
    kept = "No lock was made. The command again:"


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("enroll", cls=_EnrollmentCommand)(enroll)


def enroll(
    target: Annotated[
        str,
        typer.Argument(
            help="package.module:function, or path/to/file.py:function, that returns a fedkl.Subject: the "
            "network, this client's images and labels."
        ),
    ],
    public: Annotated[
        Path, typer.Option(help="The public model: a safetensors file, or a run directory of fedkl train.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Lock file to write.")] = None,
    store: StoreOption = None,
    client: ClientOption = None,
    defense: Annotated[
        str | None,
        typer.Option(
            help='The federation\'s lock, e.g. keylock:layers="all".', show_default="the run's, or keylock"
        ),
    ] = None,
    held_out: HeldOutOption = 0.2,
    epochs: EpochsOption = 40,
    lr: RateOption = 0.02,
    seed: SeedOption = 0,
    passphrase_file: PassphraseFileOption = None,
) -> None:
    """Makes a new client's lock on a trained public model: its own key, fitted to its own images.

    Public tensors stay as they are, and nothing is sent. The client takes part from the next round on.
    """
    from fedkl.auditing.defended import defense_of
    from fedkl.enrollment import Fitting
    from fedkl.enrollment import enroll as enrolled
    from fedkl.export import defense_of as defense_of_run
    from fedkl.export import public_tensors

    place = _place(out, store, client, passphrase_file, new=True)
    if not isinstance(place, Path):
        place.store.check_new(place.client)
    elif os.path.lexists(place):
        raise ConfigError(f"{place}: exists already. Choose another path.")
    tensors, subject = public_tensors(public), _subject(target)
    done = enrolled(
        subject.classifier(),
        public=tensors,
        images=subject.images,
        labels=subject.labels,
        defense=defense_of(defense) if defense is not None else defense_of_run(public),
        fitting=Fitting(epochs=epochs, lr=lr, held_out=held_out, seed=seed),
    )
    if isinstance(place, Path):
        done.lock.save(place, passphrase=store_passphrase(passphrase_file), replace=False)
        path = place
    else:
        place.store.add(place.client, done.lock)
        path = place.store.path(place.client)
    tell(f"{path}: a new key, and a lock fitted to this client's images. Keep it, and make a backup.")
    _tell_worth(done, before="As it was drawn")
    _tell_use(path, public, stored=not isinstance(place, Path))


def rotate_lock(
    path: Path | None,
    *,
    target: str,
    public: Path,
    store: Path | None,
    client: str | None,
    keep_function: bool,
    fitting: Fitting,
    passphrase_file: Path | None,
    unencrypted: bool,
) -> None:
    """Gives a lock file, or the lock of a store's client, a new key, and says what became of it."""
    from fedkl.defenses import KeyLock
    from fedkl.enrollment import rotate, rotate_file
    from fedkl.export import public_tensors

    place = _place(path, store, client, passphrase_file, new=False)
    if unencrypted and not isinstance(place, Path):
        raise typer.BadParameter("--unencrypted: a store's locks are always encrypted. Leave it out.")
    tensors, subject = public_tensors(public), _subject(target)
    network = subject.classifier()
    how: dict[str, Any] = {"images": subject.images, "labels": subject.labels}
    how |= {"keep_function": keep_function, "fitting": fitting}
    if isinstance(place, Path):
        passphrase = None if unencrypted else store_passphrase(passphrase_file)
        done, old = rotate_file(place, network, passphrase=passphrase, public=tensors, **how)
    else:
        with place.store.client(place.client, model=network, defense=KeyLock()) as opened:
            opened.lock.load_public_state(tensors)
            done = rotate(opened.lock, **how)
            old = place.store.rotate(opened, done.lock)
    tell(f"{old.with_suffix('')}: a new key. {_MEANINGS[keep_function]}")
    if done.lock.kept and not keep_function:
        names = ", ".join(done.lock.kept)
        tell(f"Those of {names} began again at the trained model's, which its server knows.")
    _tell_worth(done, before="With the old one")
    tell(f"{old}: the old one. Destroy it, and its backups, when the new one has proven itself.")


_MEANINGS = {
    True: "γ and β are as they were: whoever has seen them knows them still.",
    False: "γ and β are new, and fitted to this client's images.",
}


class _Stored(NamedTuple):
    """A client of a store."""

    store: ClientStore
    client: str


def _place(
    path: Path | None, store: Path | None, client: str | None, passphrase_file: Path | None, *, new: bool
) -> Path | _Stored:
    """Where a lock lies, or is to lie.

    Raises:
        BadParameter: Two places are named, or none, or half of one.
    """
    if path is not None and store is None and client is None:
        return path
    if path is not None or store is None or client is None:
        name = "--out" if new else "the path of a lock"
        raise typer.BadParameter(f"Give {name}, or --store FOLDER and --client NAME.")
    from fedkl.custody import ClientStore

    return _Stored(ClientStore(store, passphrase=store_passphrase(passphrase_file), new_keys=new), client)


def _subject(target: str) -> Subject:
    from fedkl.auditing import target as targets

    subject = targets.load(target).subject
    subject.check()
    return subject


def _tell_worth(done: Enrolled, *, before: str) -> None:
    was, now = (f"{100 * each.accuracy:.1f} %" for each in (done.before, done.after))
    tell(
        f"{before}: {was} of {done.held_out} held-out images right. Now: {now}, after {done.steps} steps on "
        f"{done.images} images, {done.seconds:.1f} s."
    )


def _tell_use(place: Path, public: Path, *, stored: bool) -> None:
    if stored:
        name, folder = place.parent.name, place.parent.parent
        config = f'fedkl-client="{name}" fedkl-store="{folder}"'
        tell(f"It takes part on Flower where its node is started with --node-config {shlex.quote(config)}.")
    model = public
    if public.is_dir():
        model = Path("model.safetensors")
        tell(f"The public model as a file: fedkl export {shlex.quote(str(public))} --out {model}")
    tell("Its model, where Net() builds the network:")
    tell(f"    fedkl.load_lock({str(place)!r}, Net(), passphrase=…, public={str(model)!r}).model.eval()")
