"""What an attack gets, what it returns, and the checks around it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedkl.errors import AttackError, gathered
from fedkl.metrics import Scaling
from fedkl.types import ImageBatch, Labels


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What the server is granted beside the public model, the public update and the protocol.

    Attributes:
        labels: The true labels.
        key: The client's key.
        lock_layers: The lock layers' weights (for other private parameters: their values).
        affine: The values of γ and β, and the norm statistics.
        affine_gradient: The gradient of γ and β, as if they were public parameters.
    """

    labels: bool = True
    key: bool = False
    lock_layers: bool = False
    affine: bool = False
    affine_gradient: bool = False

    def describe(self) -> str:
        """The granted secrets as one phrase."""
        names = {
            "labels": "labels",
            "key": "key",
            "lock_layers": "lock layers",
            "affine": "γ and β",
            "affine_gradient": "gradient of γ and β",
        }
        granted = [text for name, text in names.items() if getattr(self, name)]
        return ", ".join(granted) if granted else "nothing private"


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """All that the server has. It holds no ground truth.

    Attributes:
        model: The plain model as the server can build it: public tensors, and its own fill-in for the rest.
        gradient: The observed gradient by parameter name; a subset of the model's parameters.
        image_shape: ``(channels, height, width)``.
        classes: Number of classes.
        batch_size: Number of images behind the gradient.
        train_mode: Whether the client computed it in train mode, with the norms' batch statistics.
        labels: The labels, if granted.
    """

    model: nn.Module = field(repr=False)
    gradient: Mapping[str, Tensor] = field(repr=False)
    image_shape: tuple[int, int, int]
    classes: int
    batch_size: int
    train_mode: bool = True
    labels: Labels | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parameters = dict(self.model.named_parameters())
        problems = [
            f"'{name}' is not a parameter of the model" for name in self.gradient if name not in parameters
        ]
        for name in set(self.gradient).intersection(parameters):
            expected, got = tuple(parameters[name].shape), tuple(self.gradient[name].shape)
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
        if problems:
            remedy = "Observe a gradient of this model, by parameter name."
            raise AttackError(gathered("This observation is impossible.", sorted(problems), remedy))

    @property
    def kind(self) -> Hashable:
        """What observations must have in common to be attacked as one batch."""
        return (
            tuple((name, tuple(tensor.shape)) for name, tensor in self.model.named_parameters()),
            tuple(sorted(self.gradient)),
            self.image_shape,
            self.classes,
            self.batch_size,
            self.train_mode,
            self.labels is None,
        )

    @property
    def scaling(self) -> Scaling:
        """How an attack without a prior of its own must fix what the gradient leaves free.

        A norm behind the first layer, unless it uses running statistics, makes the gradient invariant to the
        image's scale: only the knowledge that pixels are in [0, 1] can fix it then. A norm further back may
        leave the scale pinned; the rule then costs an attack some quality and is to its disadvantage.
        """
        own_statistics = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
        kinds = (*own_statistics, nn.modules.batchnorm._NormBase) if self.train_mode else own_statistics
        return "prior" if any(isinstance(module, kinds) for module in self.model.modules()) else "clip"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """What an attack found.

    Attributes:
        images: As the attack left them, not clamped; float32, shape ``(batch, channels, height, width)``. NaN
            where no start ever had a finite loss: that is a failure, not noise to be scored.
        labels: Labels found or granted; None if the attack does not find any.
        scaling: How its scale and offset are to be fixed before scoring: ``"clip"`` where the gradient or the
            attack's own prior pins them, else ``"prior"``.
        loss: The attacker's own objective at the end, relative to the start of all-zero gradients
            (1 = as far from the observed gradient as a zero gradient).
        evaluations: Evaluations of the objective that the chosen start used.
        start: Which of the restarts was chosen, by the attacker's own loss only.
    """

    images: ImageBatch = field(repr=False)
    labels: Labels | None
    scaling: Scaling
    loss: float
    evaluations: int
    start: int


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of all attacks. An author writes `_run`; checks are made here."""

    def reconstruct(self, observation: Observation, *, generator: torch.Generator) -> Reconstruction:
        """Attacks one observation.

        Args:
            observation: What the server has.
            generator: Source of the attack's randomness.

        Raises:
            AttackError: This attack cannot work on the observation.
        """
        return self.reconstruct_many([observation], generators=[generator])[0]

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        *,
        generators: Sequence[torch.Generator],
        on_evaluation: Callable[[int, int], None] | None = None,
    ) -> list[Reconstruction]:
        """Attacks observations of one kind at once; up to rounding, results do not depend on the company.

        Args:
            observations: All of the same `Observation.kind`.
            generators: One per observation.
            on_evaluation: Called with (evaluations so far, problems still running).

        Raises:
            AttackError: The observations differ in kind, or this attack cannot work on them.
        """
        if not observations or len(observations) != len(generators):
            raise AttackError(
                f"{type(self).__name__}: expected one generator per observation and at least one, "
                f"got {len(observations)} observations and {len(generators)} generators."
            )
        kinds = {observation.kind for observation in observations}
        if len(kinds) > 1:
            raise AttackError(
                f"{type(self).__name__}: expected observations of one kind, got {len(kinds)} kinds."
            )
        return self._run(list(observations), list(generators), on_evaluation or _ignore)

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Callable[[int, int], None],
    ) -> list[Reconstruction]:
        raise NotImplementedError


def _ignore(evaluations: int, running: int) -> None:
    return
