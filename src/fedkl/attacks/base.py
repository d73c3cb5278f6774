"""What an attack returns, and the checks around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedkl.attacks.parallel import Progress, shared_out
from fedkl.errors import AttackError
from fedkl.metrics import Scaling
from fedkl.protocol import Observation
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


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of all attacks. An author writes `_run`; checks are made here."""

    @property
    def divisible(self) -> bool:
        """Whether observations can be shared out among threads: not where one of them serves the others."""
        return True

    @property
    def reads_sums(self) -> bool:
        """Whether it can read the mean over a cohort, which no single network has computed."""
        return False

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
            workers: Threads that share the observations out, each on one core.

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
        if observations[0].cohort > 1 and not self.reads_sums:
            raise AttackError(
                f"{type(self).__name__}: expected the update of one client, got the mean over "
                f"{observations[0].cohort}. Use the attack learned, or cohort = 1."
            )
        self._check(observations[0])
        pairs = list(zip(observations, generators, strict=True))

        def run(share: list[tuple[Observation, torch.Generator]], progress: Progress) -> list[Reconstruction]:
            return self._run([o for o, _ in share], [g for _, g in share], progress)

        return shared_out(run, pairs, workers=workers if self.divisible else 1, progress=on_evaluation)

    def _below(self, **least: int) -> list[str]:
        """Which settings are below their least value, as phrases for a message."""
        return [f"{name} ≥ {low}" for name, low in least.items() if getattr(self, name) < low]

    def _check(self, observation: Observation) -> None:
        """Raises AttackError where this attack cannot work on observations of this kind."""

    def _run(
        self,
        observations: list[Observation],
        generators: list[torch.Generator],
        on_evaluation: Progress,
    ) -> list[Reconstruction]:
        raise NotImplementedError
