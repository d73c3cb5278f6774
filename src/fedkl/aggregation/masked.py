"""Masked sums: the server adds up updates that it cannot read. In one process, whole protocol included.

Members and server are played here, and nothing passes between them but the messages of docs/masked.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedkl import rng
from fedkl.aggregation.base import (
    Aggregation,
    FederationPlan,
    RoundAggregation,
    RoundPlan,
    Seen,
    SeenUpdate,
    ServerLearns,
)
from fedkl.aggregation.masked_members import Cohort
from fedkl.aggregation.plain import check_planned
from fedkl.errors import ConfigError, MaskingError, RoundLostError, UpdateError, gathered
from fedkl.lockfile import byte_tensor, bytes_of
from fedkl.masking import (
    Call,
    Contribution,
    Layout,
    MaskedSum,
    Member,
    Mode,
    Rules,
    SealedSum,
    Upload,
    opened_mean,
)
from fedkl.masking.attempts import RevealSets, further_attempt
from fedkl.masking.sums import sum_of, sum_tensors
from fedkl.masking.words import MAX_MEMBERS, MAX_SAMPLES, WordBits
from fedkl.parsing import parse_json_object
from fedkl.types import NamedTensors
from fedkl.update import PublicUpdate

_SETS = "reveals"
_KEPT_UP_TO = 64  # members, whose updates a further attempt may need; of more, they take too much memory


@dataclass(frozen=True, kw_only=True)
class MaskedAggregation(Aggregation):
    """Updates come masked; see docs/masked.md.

    Attributes:
        mode: ``"blind"``: the server reads nothing, not even the sum. ``"pairwise"``: it reads the sum.
            ``"both"``: nothing, and members cannot read one another either.
        bits: Of a word: 64, or 32 for large models.
        minimum: Fewest updates in a sum, at least 3.
        lost: Probability, in [0, 1), that a client is gone after its update is in, before it reveals.
    """

    type: Literal["masked"] = "masked"
    mode: Mode = "blind"
    bits: WordBits = 64
    minimum: int = 3
    lost: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.lost < 1:
            raise ConfigError(f"aggregation: lost: expected a probability in [0, 1), got {self.lost}.")
        if self.minimum < 3:
            raise ConfigError(f"aggregation: minimum: expected at least 3, got {self.minimum}.")

    @property
    def server_learns(self) -> ServerLearns:
        """The sum in pairwise mode, otherwise nothing."""
        return "sum" if self.mode == "pairwise" else "nothing"

    def describe(self) -> str:
        """Its masks."""
        return "blind and pairwise masks" if self.mode == "both" else f"{self.mode} masks"

    def for_federation(self, plan: FederationPlan) -> MaskedFederation:
        """A cohort of all clients.

        Raises:
            ConfigError: There are too few or too many clients, or one has too many samples.
        """
        return MaskedFederation(self, plan)

    def begin(self, plan: RoundPlan, *, record: bool = False) -> MaskedRound:
        """Not here: rounds need the members' memory.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("MaskedAggregation: begin rounds of what for_federation(…) gives.")


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenUpload(Seen):
    """A masked update, as the server has it.

    Attributes:
        upload: Words, nonce, encrypted shares.
        layout: What the words would be, if they could be read.
    """

    upload: Upload = field(repr=False)
    layout: Layout = field(repr=False)

    def as_numbers(self) -> dict[str, Tensor]:
        """The words taken for numbers in [−1, 1): all that an attack on floats can be given."""
        bits = self.layout.words.bits
        words = self.upload.words[self.layout.head :].view(f"<i{bits // 8}")
        found = {}
        for name, spec, place in self.layout.float_places():
            numbers = words[place].astype(np.float64) / 2.0 ** (bits - 1)
            found[name] = torch.from_numpy(numbers).to(spec.dtype).reshape(spec.shape)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenSum(SeenUpdate):
    """A sum in the clear: what a server reads with pair masks.

    Attributes:
        update: The weighted mean; it stands for the samples of all.
    """


class MaskedFederation(Aggregation):
    """The members of one federation, and what they keep between rounds.

    Args:
        options: Which masks.
        plan: Of the federation.

    Raises:
        ConfigError: The federation cannot be masked so.
    """

    type = "masked"

    def __init__(self, options: MaskedAggregation, plan: FederationPlan) -> None:
        self.options = options
        self._plan = plan
        self._rules = _rules(options, plan)
        self._cohort = Cohort.new(self._rules, plan.clients, today=date.today())
        self._last: SealedSum | None = None
        self.sets = RevealSets()
        self._members: dict[str, Member] = {}

    @property
    def server_learns(self) -> ServerLearns:
        """The sum in pairwise mode, otherwise nothing."""
        return self.options.server_learns

    def begin(self, plan: RoundPlan, *, record: bool = False) -> MaskedRound:
        """Begins a round: every member that is asked takes the server's model, or opens the last sum."""
        if not self._members:
            self._members = self._cohort.members(plan)
        return MaskedRound(self, plan, record=record)

    def member(self, name: str) -> Member:
        """A member, once a round has begun."""
        return self._members[name]

    @property
    def run(self) -> bytes:
        """The run's name."""
        return self._cohort.run

    def receive(self, member: Member, plan: RoundPlan) -> None:
        """What a member gets at the beginning of a round."""
        if self._last is None or self._plan.steps:
            member.accept_model(self.run, plan.state)
        else:
            member.open(self._last)

    def passed_on(self, total: SealedSum) -> None:
        """Members get this sum at the beginning of the next round."""
        self._last = total

    def lost(self, round: int, attempt: int, names: tuple[str, ...]) -> list[str]:
        """Who is gone before it reveals."""
        draws = rng.generator(self._plan.seed, "lost", round, attempt)
        chances = torch.rand(len(names), generator=draws).tolist()
        return [name for name, chance in zip(names, chances, strict=True) if chance < self.options.lost]

    @property
    def secrets(self) -> dict[str, Tensor]:
        """Keys, the cohort's key, memories, the last sum, and whom members were asked to reveal for."""
        sets = self.sets.to_json()
        named = {_SETS: byte_tensor(json.dumps({"sets": sets}).encode())} if sets else {}
        return self._cohort.secrets() | sum_tensors(self._last) | named

    def restore(self, secrets: NamedTensors) -> None:
        """Takes over what `secrets` gave.

        Raises:
            ConfigError: It is of another federation.
        """
        # All are read before any is taken over: a damaged checkpoint changes nothing.
        cohort, last = Cohort.restored(self._rules, self._plan.clients, secrets), sum_of(secrets)
        sets = _sets_of(secrets)
        self._cohort, self._last, self.sets = cohort, last, sets
        self._members = {}


class MaskedRound(RoundAggregation[PublicUpdate, dict[str, Tensor]]):
    """One round of masked sums.

    Args:
        federation: The members.
        plan: What is agreed.
        record: Whether every upload is kept for `what_the_server_sees`.
    """

    def __init__(self, federation: MaskedFederation, plan: RoundPlan, *, record: bool) -> None:
        super().__init__(plan.clients)
        self._federation = federation
        self._plan = plan
        self._ready: set[str] = set()
        self._attempts = [self._attempt(0, tuple(sorted(plan.clients)))]
        self._updates: dict[str, PublicUpdate] = {}  # where a second attempt may need them
        self._seen: list[Seen] | None = [] if record else None

    def _attempt(self, number: int, cohort: tuple[str, ...]) -> MaskedSum:
        federation = self._federation
        call = Call(run=federation.run, round=self._plan.round, attempt=number, cohort=cohort)
        layout = federation.member(cohort[0]).layout
        options = federation.options
        return MaskedSum(call, layout=layout, mode=options.mode, minimum=options.minimum)

    @property
    def enough(self) -> bool:
        """Whether a sum of what was offered would be opened."""
        attempt = self._attempts[-1]
        return len(self.offered) >= (attempt.minimum if self._updates else attempt.needed)

    @property
    def update_bytes(self) -> int:
        """Size of one upload: words, nonce and shares."""
        return self._attempts[0].upload_bytes

    def what_the_server_sees(self) -> tuple[Seen, ...]:
        """Each upload as it came, and with pair masks the sum.

        Raises:
            ConfigError: The round was begun without `record`.
        """
        if self._seen is None:
            raise ConfigError("MaskedAggregation: this round is not recorded. Begin it with record=True.")
        return tuple(self._seen)

    def _take(self, client: str, update: PublicUpdate) -> None:
        check_planned(self._plan, client, update)
        self._upload(self._attempts[-1], client, update)
        attempt = self._attempts[-1]
        if attempt.mode != "blind" and len(attempt.call.cohort) <= _KEPT_UP_TO:
            self._updates[client] = update

    def _upload(self, attempt: MaskedSum, client: str, update: PublicUpdate) -> None:
        member = self._federation.member(client)
        contribution = Contribution(tensors=update.tensors, samples=update.num_samples)
        try:
            if client not in self._ready:
                self._federation.receive(member, self._plan)
                self._ready.add(client)
            upload = member.upload(attempt.call, contribution)
            attempt.offer(upload)
        except MaskingError as error:
            raise UpdateError(str(error)) from error
        if self._seen is not None:
            self._seen.append(SeenUpload(clients=(client,), upload=upload, layout=attempt.layout))

    def _result(self) -> dict[str, Tensor]:
        try:
            total = self._total()
            mean = self._opened(total)
        except MaskingError as error:
            raise RoundLostError(str(error)) from error
        self._updates.clear()
        self._federation.passed_on(total)
        return mean

    def _total(self) -> SealedSum:
        """The sum of the first attempt that can be opened."""
        while True:
            attempt = self._attempts[-1]
            if attempt.mode == "blind" or (len(attempt.offered) < attempt.needed and not self._updates):
                return attempt.sealed()
            gone = self._gone(attempt)
            here = [name for name in attempt.offered if name not in gone]
            left = further_attempt(attempt, here=here, sets=self._federation.sets)
            if left is None:
                return self._revealed(attempt, here)
            self._attempts.append(self._again(attempt, left))

    def _again(self, before: MaskedSum, left: tuple[str, ...]) -> MaskedSum:
        """A further attempt, by those who are left; who has nothing to mask, or refuses, is not in it."""
        again = self._attempt(before.call.attempt + 1, left)
        for name in left:
            if name in self._updates:
                with suppress(UpdateError):
                    self._upload(again, name, self._updates[name])
        return again

    def _revealed(self, attempt: MaskedSum, here: Sequence[str]) -> SealedSum:
        self._federation.sets.add(attempt.model, attempt.listed)
        refusals = []
        for name in here:
            try:
                attempt.offer_reveal(self._federation.member(name).reveal(attempt.list_for(name)))
            except MaskingError as error:  # the others may be enough
                refusals.append(f"{name}: {error}")
        if refusals and attempt.missing:
            summary = f"Round {attempt.call.round}: cannot be opened, as members refuse to reveal."
            raise MaskingError(gathered(summary, refusals, "Correct what they name."))
        return attempt.sealed()

    def _gone(self, attempt: MaskedSum) -> set[str]:
        call = attempt.call
        lost = self._federation.lost(call.round, call.attempt, attempt.offered)
        return {*self.dropped, *lost} & set(attempt.offered)

    def _opened(self, total: SealedSum) -> dict[str, Tensor]:
        """What the sum says: to the server where it can read it, otherwise to one of the members."""
        layout = self._attempts[-1].layout
        if self._federation.server_learns == "sum":
            booleans = {name: self._plan.state[name] for name in layout.booleans}
            mean = opened_mean(total, layout=layout, booleans=booleans)
            if self._seen is not None:
                self._seen.append(self._sum_seen(total, mean.tensors, mean.samples))
            return mean.tensors
        first = next(iter(total.listed))
        return self._federation.member(first).open(total).tensors

    def _sum_seen(self, total: SealedSum, tensors: NamedTensors, samples: int) -> SeenSum:
        update = PublicUpdate(
            schema=self._plan.schema, tensors=tensors, num_samples=samples, round=self._plan.round
        )
        return SeenSum(clients=tuple(total.listed), update=update)


def _rules(options: MaskedAggregation, plan: FederationPlan) -> Rules:
    count, most = len(plan.clients), max(plan.clients.values())
    checks = {
        f"clients: expected {options.minimum} (aggregation.minimum) to {MAX_MEMBERS}, got {count}": (
            options.minimum <= count <= MAX_MEMBERS
        ),
        f"samples of a client: expected at most {MAX_SAMPLES}, got {most}": most <= MAX_SAMPLES,
    }
    problems = [problem for problem, fine in checks.items() if not fine]
    if problems:
        raise ConfigError(gathered("This federation cannot be masked.", problems, "Correct these."))
    return Rules(
        mode=options.mode,
        bits=options.bits,
        minimum=options.minimum,
        max_samples=most,
        sampled=plan.sampled,
        server_model=plan.steps,
    )


def _sets_of(secrets: NamedTensors) -> RevealSets:
    """Whom members were asked to reveal for.

    Raises:
        ConfigError: It is damaged.
    """
    if _SETS not in secrets:  # nobody was, or an older fedkl wrote it
        return RevealSets()
    try:
        return RevealSets.from_json(parse_json_object(bytes_of(secrets[_SETS]))["sets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("The checkpoint's masks are damaged.") from error
