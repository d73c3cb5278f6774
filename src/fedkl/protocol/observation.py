"""What a server has of a client: the model, the update, the protocol, and what it was granted beyond."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedkl.errors import AttackError, gathered
from fedkl.metrics import Scaling
from fedkl.norms import loses_scale, mixes_images
from fedkl.protocol.procedure import Procedure, trained_parameters
from fedkl.protocol.transforms import Rescaling, Transform
from fedkl.types import ImageBatch, Labels


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What the server is granted beside the public model, the public update and the protocol.

    Attributes:
        labels: The true labels.
        key: The client's key.
        lock_layers: The lock layers' weights (for other private parameters: their values).
        lock_gradient: The gradient of the lock layers' weights.
        affine: The values of γ and β, and the norm statistics.
        affine_gradient: The gradient of γ and β, as if they were public parameters.
        auxiliary: How many labeled images of the same kind the server owns.
        defense: That clients use the defense, so that the server allows for it, as any defense must expect.
            Without, it takes what it sees for a plain client's: what most papers attack.
    """

    labels: bool = True
    key: bool = False
    lock_layers: bool = False
    lock_gradient: bool = False
    affine: bool = False
    affine_gradient: bool = False
    auxiliary: int = 0
    defense: bool = True

    def describe(self) -> str:
        """The granted secrets as one phrase."""
        names = {
            "labels": "labels",
            "key": "key",
            "lock_layers": "lock layers",
            "lock_gradient": "gradient of the lock layers",
            "affine": "γ and β",
            "affine_gradient": "gradient of γ and β",
        }
        granted = [text for name, text in names.items() if getattr(self, name)]
        granted += [f"{self.auxiliary} auxiliary images"] if self.auxiliary else []
        return ", ".join(granted) if granted else "nothing private"


@dataclass(frozen=True, kw_only=True, eq=False)
class Auxiliary:
    """Data of the server's own, and what the protocol's clients would send for it.

    Observations with the same `Auxiliary` object are of the same public model and protocol: what an attack
    learns for one of them holds for all.

    Attributes:
        images: None of a client's; shape ``(images, channels, height, width)``.
        labels: Theirs.
        simulate: What one new client sends for each of several batches, all from the public model as it is:
            images of shape ``(updates, batch, channels, height, width)`` and labels ``(updates, batch)`` to
            tensors by name, stacked over the updates. The client is prepared as the defense says, with
            secrets of the server's own draw, but for those that it was granted.
        seed: Of what is learned from them: the same for every observation that shares it.
        draw: The private parameters of one new client, by their names in `Observation.model`: what it was
            granted of them is as it is, the rest is drawn as the defense draws it. None where it cannot say.
    """

    images: ImageBatch = field(repr=False)
    labels: Labels = field(repr=False)
    simulate: Callable[[Tensor, Tensor], dict[str, Tensor]] = field(repr=False)
    seed: int = 0
    draw: Callable[[], dict[str, Tensor]] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """All that the server has. It holds no ground truth.

    Attributes:
        model: The plain model as the server can build it: public tensors, and its own fill-in for the rest.
            Observations of one network may share it or its tensors: it is read only.
        gradient: The observed gradient by parameter name, of some of the model's parameters and `secrets`.
        image_shape: ``(channels, height, width)``.
        classes: Number of classes.
        batch_size: Number of images behind the gradient.
        train_mode: Whether the client computed it in train mode, with the norms' batch statistics.
        labels: The labels, if granted.
        local: What the client did before it sent its update. Where weights were sent, `gradient` is
            (before − after) / lr of them.
        secrets: What generates some of the model's parameters (a key and lock layers), by name: the server's
            guesses, true where granted.
        generate: Maps `secrets` to those parameters by name, differentiably; hashable, equal where it does
            the same.
        free: Names, of the model's parameters or of `secrets`, whose values the server does not know and
            which an attack finds together with the images, from those values on.
        transform: What a defense does publicly to the change that is sent, e.g. clipping: the attack does the
            same to its own. Works on tensors by name, under `torch.func.vmap`.
        auxiliary: Data of the server's own, if granted.
        client: Which client sent it: those with the same number come from one client and its secrets. None
            where every update is of another client, or it is not known.
        cohort: The gradient is the mean over so many clients, with secrets of their own, that share the batch
            evenly, in its order: what secure aggregation shows.
        statistics: Mean and biased variance of the client's batch per channel, by a norm's qualified name:
            what uploaded running statistics give away. Empty where they are private, in eval mode (they do
            not change), and after several local steps or of a cohort (they mix).
    """

    model: nn.Module = field(repr=False)
    gradient: Mapping[str, Tensor] = field(repr=False)
    image_shape: tuple[int, int, int]
    classes: int
    batch_size: int
    train_mode: bool = True
    labels: Labels | None = field(default=None, repr=False)
    local: Procedure = field(default_factory=Procedure)
    secrets: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    generate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = field(default=None, repr=False)
    free: tuple[str, ...] = ()
    transform: Transform | None = field(default=None, repr=False)
    auxiliary: Auxiliary | None = field(default=None, repr=False)
    client: int | None = None
    cohort: int = 1
    statistics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        known = dict(self.model.named_parameters()) | dict(self.secrets)
        buffers = {name for name, _ in self.model.named_buffers()}.intersection(self.gradient)
        problems = [
            f"'{name}' is {'a buffer' if name in buffers else 'not a parameter'} of the model"
            for name in self.gradient
            if name not in known
        ]
        for name in set(self.gradient).intersection(known):
            expected, got = tuple(known[name].shape), tuple(self.gradient[name].shape)
            if expected != got:
                problems.append(f"the gradient of '{name}' has shape {got}, expected {expected}")
            elif not bool(torch.isfinite(self.gradient[name]).all()):
                problems.append(f"the gradient of '{name}' has non-finite values")
        if not self.gradient:
            problems.append("no gradient was observed")
        elif all(not bool(tensor.any()) for tensor in self.gradient.values()):
            problems.append("every observed gradient is zero")
        if self.labels is not None and tuple(self.labels.shape) != (self.batch_size,):
            problems.append(f"labels have shape {tuple(self.labels.shape)}, expected ({self.batch_size},)")
        if self.cohort < 1 or self.batch_size % self.cohort:
            problems.append(f"{self.cohort} clients cannot share {self.batch_size} images evenly")
        problems += self._problems_of_statistics()
        problems += self._problems_of_secrets(set(known))
        if problems:
            remedy = "Observe a gradient of this model, by parameter name."
            if buffers:
                remedy += (
                    " Weights are sent with buffers, which have no gradient: leave them out, and take the "
                    "names of model.named_parameters() only. What running statistics tell goes into "
                    "`statistics`."
                )
            raise AttackError(gathered("This observation is impossible.", sorted(problems), remedy))

    def _problems_of_statistics(self) -> list[str]:
        modules, problems = dict(self.model.named_modules()), []
        for name, (mean, variance) in self.statistics.items():
            norm = modules.get(name)
            if not isinstance(norm, nn.modules.batchnorm._NormBase):
                problems.append(f"'{name}' has statistics, but is no batch or instance norm of the model")
                continue
            expected = (norm.num_features,)
            if {tuple(mean.shape), tuple(variance.shape)} != {expected}:
                got = f"{tuple(mean.shape)} and {tuple(variance.shape)}"
                problems.append(f"mean and variance at '{name}' have shapes {got}, expected {expected}")
            elif not bool(mean.isfinite().all() & variance.isfinite().all() & (variance >= 0).all()):
                problems.append(f"mean and variance at '{name}' are not finite, or a variance is below 0")
        return problems

    def _problems_of_secrets(self, known: set[str]) -> list[str]:
        problems = [
            f"'{name}' is to be free, but there is no such tensor" for name in self.free if name not in known
        ]
        if bool(self.secrets) != (self.generate is not None):
            problems.append("secrets and generate belong together; only one of them was given")
        taken = set(self.generated).intersection({*self.free, *self.gradient})
        problems += [f"'{name}' is generated from secrets, and cannot be free or observed" for name in taken]
        return problems

    @property
    def generated(self) -> tuple[str, ...]:
        """Names of the model's parameters that `secrets` generate."""
        return () if self.generate is None else tuple(self.generate(self.secrets))

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of what the client's local steps change: parameters and lock layers, never the key."""
        parameters = trained_parameters(self.model)
        links = [name for name in self.secrets if "." in name]  # a parameter's name has a module's before it
        generated = set(self.generated)
        return tuple(name for name in (*parameters, *links) if name not in generated)

    @property
    def unsent(self) -> frozenset[str]:
        """Names of `trained` that the client keeps: lock layers, and parameters that were not observed."""
        return frozenset(n for n in self.trained if n in self.secrets or n not in self.gradient)

    def as_gradient(self) -> Observation:
        """The same, of a gradient, where the weights after one step of SGD were sent; else this one itself.

        Those are a gradient with a factor, in the digits that weights have. Of a rescaled one, weight decay
        cannot be taken out again, as its factor is not known: it stays in as an error.
        """
        local, images = self.local, self.batch_size // self.cohort
        one_step = local.algorithm == "fedavg" and local.optimizer == "sgd" and local.step_count(images) == 1
        of_all = one_step and len(local.batches(images)[0]) == images  # and not of those of a smaller batch
        plain = self.transform is None or self._rescaled
        if not of_all or not plain or self.secrets or local.augmentation != "none":
            return self
        received, share = dict(self.model.named_parameters()), local.summed_share(images)
        decay = local.decay(private=False) if self.transform is None else 0.0
        gradient = {
            name: tensor / share - decay * received[name].detach() for name, tensor in self.gradient.items()
        }
        return replace(self, gradient=gradient, local=Procedure(per_example=local.per_example))

    def as_one_client(self) -> Observation:
        """The same, of one client that has all images, where the mean over a cohort is their gradient.

        So it is after one step of clients that keep nothing back; norms that mix a batch's images, and
        limits that each client sets its own change, make it something else. This one itself then.
        """
        if self.cohort == 1:
            return self
        found = self.as_gradient()
        mixed = any(mixes_images(each, train_mode=self.train_mode) for each in self.model.modules())
        kept = found.unsent or found.transform is not None
        return self if mixed or kept or not found.local.is_gradient else replace(found, cohort=1)

    @property
    def altered(self) -> frozenset[str]:
        """Names of what is not as the client computed it, up to noise and one positive factor of all."""
        if self.transform is None:
            return frozenset()
        if not isinstance(self.transform, Rescaling) or not self._rescaled:
            return frozenset(self.gradient)
        return frozenset(self.transform.altered(self.model)).intersection(self.gradient)

    @property
    def _rescaled(self) -> bool:
        return isinstance(self.transform, Rescaling) and self.cohort == 1  # each client has its own factor

    @property
    def up_to_a_factor(self) -> bool:
        """Whether `gradient` is what the client computed, up to noise and one positive factor."""
        return not self.altered

    def unaltered(self) -> Observation:
        """The same of what was not `altered`; this one itself where that is all or nothing."""
        left = {name: tensor for name, tensor in self.gradient.items() if name not in self.altered}
        found = any(bool(tensor.any()) for tensor in left.values())
        return replace(self, gradient=left) if found and self.altered else self

    @property
    def kind(self) -> Hashable:
        """What observations must have in common to be attacked as one batch."""
        return (
            tuple((name, tuple(tensor.shape)) for name, tensor in self.model.named_parameters()),
            tuple((name, tuple(tensor.shape)) for name, tensor in self.model.named_buffers()),
            tuple(sorted(self.gradient)),
            self.image_shape,
            self.classes,
            self.batch_size,
            self.cohort,
            self.train_mode,
            self.labels is None,
            self.local,
            tuple((name, tuple(tensor.shape)) for name, tensor in self.secrets.items()),
            self.generate,
            self.free,
            self.transform,
            self.auxiliary is None,
            tuple(sorted(self.statistics)),
        )

    def own_data(self, attack: str, *, least: int) -> Auxiliary:
        """The server's own data, for an attack that cannot do without.

        Args:
            attack: Its name.
            least: How many images it needs.

        Raises:
            AttackError: There are fewer.
        """
        got = 0 if self.auxiliary is None else len(self.auxiliary.images)
        if self.auxiliary is None or got < least:
            raise AttackError(
                f"{attack}: expected at least {least} auxiliary images of the server's own, got {got}. Grant "
                f"more: auxiliary = {max(least, 2000)}."
            )
        return self.auxiliary

    @property
    def scaling(self) -> Scaling:
        """How an attack without a prior of its own must fix what the gradient leaves free.

        A norm behind the first layer, unless it uses running statistics, makes the gradient invariant to the
        image's scale: only the knowledge that pixels are in [0, 1] can fix it then. A norm further back may
        leave the scale pinned; the rule then costs an attack some quality and is to its disadvantage.
        """
        lost = any(loses_scale(module, train_mode=self.train_mode) for module in self.model.modules())
        return "prior" if lost else "clip"
