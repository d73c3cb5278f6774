"""A new client of a trained federation: its own key, and a lock that is fitted to its images."""

from __future__ import annotations

from torch import Tensor, nn

from fedkl.defenses import Defense, KeyLock
from fedkl.enrollment.fitting import Enrolled, Fitting, fitted
from fedkl.errors import LockError
from fedkl.locking import Lock
from fedkl.types import Images, NamedTensors
from fedkl.update import check_tensors


def enroll(
    model: nn.Module,
    *,
    public: NamedTensors,
    images: Images,
    labels: Tensor,
    defense: Defense | None = None,
    fitting: Fitting | None = None,
) -> Enrolled:
    """Makes a new client's lock on the public model of a federation that it did not train with.

    The key and the start of the lock and of private layers come from the operating system. Then only what is
    private is fitted: lock layers, private layers, norm statistics. The public tensors stay bit for bit as
    they came, so nothing is sent, and nobody else notices.

    Args:
        model: The plain network; not changed. Its weights do not matter, unless the federation started from a
            trained model: then it is that one, as for `fedkl.flower.LockMod`.
        public: The federation's public tensors by name, e.g. of `fedkl.modelfile.read_model`.
        images: The client's own, shape ``(images, …)``, as the network is called with.
        labels: int64, shape ``(images,)``.
        defense: How the federation's clients are locked; `KeyLock()` if None.
        fitting: How the lock is fitted.

    Returns:
        The lock with the public tensors in it, and what it is worth.

    Raises:
        UpdateError: The public tensors are not those of this network behind this defense.
        LockError: The network cannot be locked so, or this defense makes no locks.
        DataError: There are too few images, or labels do not fit them or the network.
        TrainingError: The fitting diverged.

    >>> import torch, fedkl
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> member = fedkl.lock(net)
    >>> x = torch.rand(60, 4)
    >>> new = enroll(net, public=member.public_state(), images=x, labels=(x[:, 0] > 0.5).long())
    >>> new.images, new.held_out, new.lock.key is member.key
    (48, 12, False)
    """
    lock = _locked(model, defense or KeyLock(), images)
    check_tensors(
        public,
        lock.schema("weights").specs,
        subject=f"public: not the public tensors of a locked {type(model).__name__}.",
        remedy="Give those of the federation, and lock with the defense that its clients have.",
    )
    lock.load_public_state(public)
    return fitted(lock, images=images, labels=labels, fitting=fitting or Fitting())


def _locked(model: nn.Module, defense: Defense, images: Images) -> Lock:
    if len(images.shape) == 4:
        _, channels, height, width = images.shape
        defense = defense.for_images((channels, height, width))
    split = defense.prepare(model)
    if not isinstance(split, Lock):
        raise LockError(
            f"enroll: clients of '{defense.type}' have no locks. Give the lock that the federation's have, "
            "e.g. KeyLock(layers='all')."
        )
    return split
