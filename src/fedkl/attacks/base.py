"""What an attack returns, and the checks around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from fedkl.attacks.memory import available_memory
from fedkl.attacks.parallel import Progress, shared_out
from fedkl.errors import AttackError, ConfigError
from fedkl.metrics import Scaling, as_pictures
from fedkl.protocol import Observation
from fedkl.protocol.differentiable import plain_attention
from fedkl.registration import Kinds
from fedkl.types import ImageBatch, Labels


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

    @property
    def pictures(self) -> ImageBatch:
        """`images` as the attacker would show them: on the CPU, in [0, 1] by `scaling`; NaN where failed."""
        return as_pictures(self.images, scaling=self.scaling)


Reason = Literal["does not apply", "too large", "broke"]
"""Why an attack came to no reconstruction."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why an attack does not begin with an observation.

    Attributes:
        kind: ``"does not apply"``: it is not made for such a one. ``"too large"``: it would not fit into
            memory.
        reason: In one sentence, with the size if it is that.
    """

    kind: Reason
    reason: str


class RefusedError(AttackError):
    """An attack did not begin; `refusal` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an attack needs, said before any work.

    Attributes:
        batch: Images behind an update at most; None: any number.
        sums: Whether it reads the mean over any cohort; others, that which is the gradient of one batch.
        own_images: Labeled images of the server's own, at least.
    """

    batch: int | None = None
    sums: bool = False
    own_images: int = 0

    def missing(self, observation: Observation) -> str | None:
        """What an observation lacks, as a phrase; None if nothing."""
        own = 0 if observation.auxiliary is None else len(observation.auxiliary.images)
        limits = {
            f"at most {self.batch} images behind an update, got {observation.batch_size}": (
                self.batch is not None and observation.batch_size > self.batch
            ),
            f"the update of one client, got the mean over {observation.cohort}": (
                observation.cohort > 1 and not self.sums
            ),
            f"at least {self.own_images} auxiliary images of the server's own, got {own}": (
                own < self.own_images
            ),
        }
        return next((text for text, lacks in limits.items() if lacks), None)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of all attacks. An author writes `_run`; checks are made here.

    An attack of your own derives from it, is a frozen dataclass with a field `type`, and is registered with
    `register_attack`.
    """

    title: ClassVar[str] = ""  # its name as in the literature; empty: its type
    reads_gradients: ClassVar[bool] = False  # of weights after one step it gets the gradient in them
    reads_unaltered: ClassVar[bool] = (
        False  # of tensors that a defense altered it gets none, if others are left
    )
    knows_locks: ClassVar[bool] = False  # of a lock it reads or imitates more than a guess of its secrets
    type: str = "unnamed"

    @property
    def divisible(self) -> bool:
        """Whether observations can be shared out among threads: not where one of them serves the others."""
        return True

    @property
    def most_evaluations(self) -> int:
        """Evaluations of an observation that it reports at most, for displays; 0 if it cannot say."""
        return 0

    @property
    def needs(self) -> Needs:
        """What it cannot do without, as far as that can be said of any network."""
        return Needs()

    def memory(self, observation: Observation) -> int:
        """Bytes that its largest arrays take for one observation at a time.

        Each thread has such arrays of its own. 0 where they are no larger than the network's own work.
        """
        return 0

    def refusal(self, observation: Observation) -> Refusal | None:
        """Why it does not begin with observations of this kind; None where it does.

        Args:
            observation: What the server has.
        """
        observation = self._read(observation)
        lacking = self.needs.missing(observation)
        if lacking is not None:
            return Refusal(kind="does not apply", reason=f"{type(self).__name__}: expected {lacking}.")
        try:
            with plain_attention():
                self._check(observation)
        except AttackError as error:
            return Refusal(kind="does not apply", reason=str(error))
        wanted, there = self.memory(observation), available_memory()
        if wanted > there:
            sizes = f"{wanted / 2**30:,.0f} GiB of memory, there are {there / 2**30:,.0f}"
            return Refusal(kind="too large", reason=f"{type(self).__name__}: needs {sizes}.")
        return None

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
        on_evaluation: Progress | None = None,
        workers: int = 1,
    ) -> list[Reconstruction]:
        """Attacks observations of one kind at once; up to rounding, results do not depend on the company.

        Args:
            observations: All of the same `Observation.kind`.
            generators: One per observation.
            on_evaluation: Called with (evaluations so far, problems still running).
            workers: Threads that share the observations out, each on one core; fewer where the memory does
                not suffice for the arrays of so many.

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
        refusal = self.refusal(observations[0])
        if refusal is not None:
            raise RefusedError(refusal)
        pairs = list(zip(map(self._read, observations), generators, strict=True))

        def run(share: list[tuple[Observation, torch.Generator]], progress: Progress) -> list[Reconstruction]:
            return self._run([o for o, _ in share], [g for _, g in share], progress)

        workers = self._fitting(observations[0], workers) if self.divisible else 1
        with plain_attention():
            return shared_out(run, pairs, workers=workers, progress=on_evaluation)

    def _read(self, observation: Observation) -> Observation:
        if not self.needs.sums:
            observation = observation.as_one_client()
        if self.reads_gradients:
            observation = observation.as_gradient()
        return observation.unaltered() if self.reads_unaltered else observation

    def _fitting(self, observation: Observation, workers: int) -> int:
        """How many threads the memory suffices for, of so many and at least one."""
        wanted = self.memory(observation)
        return max(1, min(workers, available_memory() // wanted)) if wanted else workers

    def _require(self, *others: str, **least: int) -> None:
        """Raises ConfigError with every setting that is below its least value, and what was given.

        Args:
            others: What else was expected and is not so, as phrases.
            least: By the names of settings; one that is None has no least value.
        """
        given = {name: getattr(self, name) for name in least}
        wrong = [
            f"{name} ≥ {least[name]}, got {value}"
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
        if wrong or others:
            raise ConfigError(f"{type(self).__name__}: expected {'; '.join([*wrong, *others])}.")

    def _positive(self, *names: str) -> list[str]:
        """Which settings are no finite numbers above 0, as phrases for `_require`."""
        return [
            f"a finite {name} > 0, got {getattr(self, name)}"
            for name in names
            if not 0 < getattr(self, name) < math.inf
        ]

    def _not_negative(self, *names: str) -> list[str]:
        """Which settings are no finite numbers from 0 on, as phrases for `_require`."""
        return [
            f"a finite {name} ≥ 0, got {getattr(self, name)}"
            for name in names
            if not 0 <= getattr(self, name) < math.inf
        ]

    def _check(self, observation: Observation) -> None:
        """Raises AttackError where this attack cannot work on observations of this kind."""

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        raise NotImplementedError


ATTACKS: Kinds[Attack] = Kinds("attack", Attack)
"""All attacks, by the `type` that configurations name."""

register_attack = ATTACKS.register
