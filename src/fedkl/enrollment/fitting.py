"""How a lock is fitted to a client's images while the public tensors of a trained model stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.errors import ConfigError, DataError, TrainingError, gathered
from fedkl.locking import Lock, Split
from fedkl.locking.statistics import count_statistics, modes_kept
from fedkl.metrics import accuracy
from fedkl.protocol import Procedure
from fedkl.protocol.local_training import LocalTrainer, batches_of
from fedkl.protocol.procedure import loss_of
from fedkl.types import Images

LEAST_IMAGES = 20
"""Fewer say too little of γ, β and the norms' statistics, and next to nothing held out."""

_EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How private tensors are fitted.

    Attributes:
        epochs: At most so many.
        patience: Epochs without a lower held-out loss after which it stops.
        lr: Of Adam.
        batch_size: Images of a batch; those of an epoch are of nearly one size.
        held_out: The share of the images that is not trained on, in (0, 1): what decides when to stop.
        seed: Of the held-out part and the batches; never of a secret.

    Raises:
        ConfigError: A field is out of range.
    """

    epochs: int = 40
    patience: int = 5
    lr: float = 0.02
    batch_size: int = 64
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            f"patience: expected at least 1, got {self.patience}": self.patience >= 1,
            f"held_out: expected a share in (0, 1), got {self.held_out}": 0 < self.held_out < 1,
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ConfigError(gathered("Fitting is not usable.", problems, "Correct these fields."))
        _ = self.procedure  # which checks its own fields

    @property
    def procedure(self) -> Procedure:
        """What is carried out."""
        return Procedure(
            algorithm="fedavg",
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer="adam",
            lr=self.lr,
        )

    def parts(self, images: int) -> tuple[Tensor, Tensor]:
        """Indexes of the images that are trained on, and of those that are held out.

        Raises:
            DataError: There are too few.
        """
        if images < LEAST_IMAGES:
            raise DataError(f"A lock is fitted to at least {LEAST_IMAGES} images, got {images}. Take more.")
        order = torch.randperm(images, generator=rng.generator(self.seed, "fitting", "held out"))
        held_out = min(images - 2, max(1, round(self.held_out * images)))
        return order[held_out:], order[:held_out]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Mean loss, and accuracy in [0, 1], of a model in eval mode on held-out images."""

    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """A lock that was fitted, and what it is worth on images that were held out.

    Attributes:
        lock: The lock, with the public tensors that it was fitted to.
        before: As it was before: of an enrollment as its lock was drawn, of a rotation the old lock.
        after: As it is now.
        images: How many it was fitted to.
        held_out: How many were held out.
        steps: Of the optimizer, up to the one that is kept.
        seconds: Wall time of the fitting.
    """

    lock: Lock
    before: Measured
    after: Measured
    images: int
    held_out: int
    steps: int
    seconds: float


def fitted(
    lock: Lock, *, images: Images, labels: Tensor, fitting: Fitting, before: Measured | None = None
) -> Enrolled:
    """Fits a lock's private tensors, in place: its parameters by training, its norm statistics by counting.

    What is kept is the state with the lowest held-out loss, of which that with new statistics only is one.

    Args:
        lock: With the public tensors of the trained model; these stay as they are to the last bit.
        images: The client's, shape ``(images, …)``: as the model is called with.
        labels: int64, shape ``(images,)``.
        fitting: How.
        before: What the lock is compared with; None: itself, as it came.

    Raises:
        DataError: There are too few images, or labels do not fit the images or the model.
        TrainingError: The fitting diverged, nothing can be fitted, or something changed a public tensor.
    """
    check_labels(lock.model, images, labels)
    train, held_out = fitting.parts(len(labels))
    before = before or measured(lock.model, images, labels, held_out)
    begin = perf_counter()
    steps = fit_private_(lock, images=images, labels=labels, fitting=fitting)
    return Enrolled(
        lock=lock,
        before=before,
        after=measured(lock.model, images, labels, held_out),
        images=len(train),
        held_out=len(held_out),
        steps=steps,
        seconds=perf_counter() - begin,
    )


def fit_private_(split: Split, *, images: Images, labels: Tensor, fitting: Fitting) -> int:
    """The same for any client that keeps parameters to itself: a lock, private layers.

    Returns:
        Steps of the optimizer, up to the one that is kept.

    Raises:
        DataError: There are too few images.
        TrainingError: The fitting diverged, nothing can be fitted, or something changed a public tensor.
    """
    if not any(parameter.requires_grad for parameter in split.private_parameters().values()):
        raise TrainingError(
            "Nothing can be fitted: all private parameters of the lock are frozen (requires_grad=False). "
            "Lock layers that clients train."
        )
    train, held_out = fitting.parts(len(labels))
    public = split.public_state()
    drawn = rng.generator(fitting.seed, "fitting", "model").initial_seed()  # dropout's numbers
    with _only_private_trained(split), rng.seeded(drawn, device=labels.device):
        steps = _trained(split, images, labels, train, held_out, fitting)
    changed = [name for name, tensor in split.public_state().items() if not torch.equal(tensor, public[name])]
    if changed:
        problems = [f"'{name}' was changed" for name in changed]
        raise TrainingError(
            gathered("Fitting may change private tensors only.", problems, "Keep the module from writing it.")
        )
    return steps


def _trained(
    lock: Split, images: Images, labels: Tensor, train: Tensor, held_out: Tensor, fitting: Fitting
) -> int:
    """Trains until the held-out loss does not fall any more; returns after how many steps it was lowest."""
    trainer = LocalTrainer(
        lock.model, procedure=fitting.procedure, public={}, private=lock.private_parameters()
    )
    best, state, steps_of_best, steps, idle = math.inf, lock.private_state(), 0, 0, 0
    for epoch in range(fitting.epochs + 1):
        parts = _batches(train, fitting, epoch)
        if epoch > 0:  # the first candidate has new statistics, and nothing else
            draws = rng.generator(fitting.seed, "fitting", "augmentation", epoch)
            batches = batches_of(images, labels, parts, augmentation="none", generator=draws)
            losses = trainer.train(batches, samples=len(train))
            steps += len(losses)
            _check_finite(losses, lock, epoch=epoch, lr=fitting.lr)
        count_statistics(lock, images, parts)
        loss = measured(lock.model, images, labels, held_out).loss
        idle += 1
        if loss < best:
            best, state, steps_of_best, idle = loss, lock.private_state(), steps, 0
        if idle == fitting.patience:
            break
        _train_mode(lock)
    lock.load_private_state(state)
    return steps_of_best


def measured(model: nn.Module, images: Images, labels: Tensor, part: Tensor) -> Measured:
    """Loss and accuracy on the images of these indexes; the model's modes stay.

    Raises:
        DataError: The model gives no class scores.
    """
    with modes_kept(model), torch.no_grad():
        model.eval()
        scores = torch.cat([model(images[index]) for index in torch.split(part, _EVALUATION_BATCH)])
        own = labels[part]
        return Measured(accuracy=accuracy(scores, own), loss=float(loss_of(scores, own)))


def check_labels(model: nn.Module, images: Images, labels: Tensor) -> None:
    """Checks that there is a label for every image, and that the model has a score for each.

    Raises:
        DataError: There is not.
    """
    if labels.dtype != torch.int64 or tuple(labels.shape) != (len(images),):
        raise DataError(
            f"labels: expected int64 of shape ({len(images)},), one of each image, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}."
        )
    if not len(labels):
        return
    with modes_kept(model), torch.no_grad():
        model.eval()
        classes = model(images[:1]).shape[-1]
    outside = int(((labels < 0) | (labels >= classes)).sum())
    if outside:
        raise DataError(
            f"labels: expected 0 .. {classes - 1}, as the model has {classes} scores, got {outside} outside."
        )


def _batches(train: Tensor, fitting: Fitting, epoch: int) -> Sequence[Tensor]:
    """An epoch's batches, of nearly one size: norms cannot train on a last batch of one image."""
    order = torch.randperm(len(train), generator=rng.generator(fitting.seed, "fitting", "batches", epoch))
    return train[order].tensor_split(math.ceil(len(train) / fitting.batch_size))


def _check_finite(losses: Sequence[Tensor], lock: Split, *, epoch: int, lr: float) -> None:
    if bool(torch.stack(list(losses)).isfinite().all()) and all(
        bool(tensor.isfinite().all()) for tensor in lock.private_state().values()
    ):
        return
    raise TrainingError(f"The fitting diverged in epoch {epoch} (learning rate {lr:g}). Lower lr.")


def _train_mode(lock: Split) -> None:
    """Puts the model into train mode, but for modules whose buffers are public: they would change."""
    lock.model.train()
    public = lock.public_state().keys() - lock.public_parameters().keys()
    for owner in {name.rpartition(".")[0] for name in public}:
        lock.model.get_submodule(owner).eval()


@contextmanager
def _only_private_trained(lock: Split) -> Iterator[None]:
    """No gradient for public parameters meanwhile; flags and modes are put back."""
    wanted = {name: p.requires_grad for name, p in lock.public_parameters().items()}
    with modes_kept(lock.model):
        try:
            for parameter in lock.public_parameters().values():
                parameter.requires_grad_(False)
            _train_mode(lock)
            yield
        finally:
            for name, parameter in lock.public_parameters().items():
                parameter.requires_grad_(wanted[name])
            for parameter in lock.private_parameters().values():
                parameter.grad = None
