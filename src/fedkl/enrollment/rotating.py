"""A client's lock gets a new key: drawn and fitted anew, or with the very γ and β that it has."""

from __future__ import annotations

import copy
from pathlib import Path
from time import perf_counter

from torch import Tensor, nn

from fedkl.custody import Ledger
from fedkl.custody.journal import JOURNAL
from fedkl.enrollment.fitting import Enrolled, Fitting, check_labels, fitted, measured
from fedkl.errors import KeyFileError
from fedkl.lockfile import keep_copy
from fedkl.locking import Lock, read_lock
from fedkl.types import Images, NamedTensors


def rotate(
    lock: Lock,
    *,
    images: Images,
    labels: Tensor,
    keep_function: bool = False,
    fitting: Fitting | None = None,
) -> Enrolled:
    """A copy of a lock with a new key and new lock layers.

    By default γ and β are drawn anew and fitted to the client's images, and so are private layers: whoever
    has the old key and lock layers knows nothing of the new ones. But those of `Lock.kept` layers begin again
    at the trained model's, which the server knows, as they did at first.

    With `keep_function` the new lock layers generate the γ and β of now: what the model computes stays to the
    rounding of float32, and whoever knew γ and β knows them still.

    What a client remembers besides (an optimizer's moments) is to be forgotten: the moment of a first lock
    layer's W is the old key, up to a factor in each row.

    Args:
        lock: With the public tensors of the federation in it; not changed.
        images: The client's own, shape ``(images, …)``, as the network is called with.
        labels: int64, shape ``(images,)``.
        keep_function: Whether γ and β stay.
        fitting: How the lock is fitted, and which images tell what it is worth.

    Returns:
        The new lock, and what the old one and it are worth on the same held-out images.

    Raises:
        DataError: There are too few images, or labels do not fit them or the network.
        TrainingError: The fitting diverged.
    """
    fitting = fitting or Fitting()
    check_labels(lock.model, images, labels)
    train, held_out = fitting.parts(len(labels))
    before = measured(lock.model, images, labels, held_out)
    new = copy.deepcopy(lock)
    if not keep_function:
        new.redraw()
        return fitted(new, images=images, labels=labels, fitting=fitting, before=before)
    begin = perf_counter()
    new.rekey()
    return Enrolled(
        lock=new,
        before=before,
        after=measured(new.model, images, labels, held_out),
        images=len(train),
        held_out=len(held_out),
        steps=0,
        seconds=perf_counter() - begin,
    )


def rotate_file(
    path: str | Path,
    model: nn.Module,
    *,
    passphrase: str | None,
    public: NamedTensors,
    images: Images,
    labels: Tensor,
    keep_function: bool = False,
    fitting: Fitting | None = None,
) -> tuple[Enrolled, Path]:
    """The same for a lock file, which is replaced; the old one is kept beside it, as ``<name>.old-<number>``.

    What the old file remembered for its client is not in the new one.

    Args:
        path: The file.
        model: The plain network, as for `fedkl.load_lock`.
        passphrase: Of the old file and the new one; None if it is not encrypted.
        public: The federation's public tensors.
        images: See `rotate`.
        labels: See `rotate`.
        keep_function: See `rotate`.
        fitting: See `rotate`.

    Returns:
        The new lock and what it is worth, and the old one's file.

    Raises:
        KeyFileError: The file does not open, is of another network, a link, or in a client's folder of a
            store; or a file cannot be written, and the old one stays.
        UpdateError: The public tensors are not those of this lock.
        DataError, TrainingError: See `rotate`.
    """
    path = Path(path)
    _check_alone(path)
    saved = read_lock(path, model, passphrase=passphrase)
    saved.lock.load_public_state(public)
    done = rotate(saved.lock, images=images, labels=labels, keep_function=keep_function, fitting=fitting)
    old = keep_copy(path)
    done.lock.save(path, passphrase=passphrase, about=saved.about)
    return done, old


def _check_alone(path: Path) -> None:
    """Checks that nobody else keeps a count of the file, or the file itself.

    Raises:
        KeyFileError: It is a store's, whose node would write the old lock back; or a link, whose target would
            keep the old key.
    """
    if path.is_symlink():
        raise KeyFileError(f"{path}: expected a file, got a symbolic link. Give the file itself.")
    if (path.parent / JOURNAL).exists() or Ledger.read(path.parent) is not None:
        raise KeyFileError(
            f"{path}: the lock of client {path.parent.name!r} in a store. Rotate it as "
            "that store's client: its node has to stay out meanwhile, and its ledger to agree."
        )
