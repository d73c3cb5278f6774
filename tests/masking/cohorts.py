"""Cohorts of members for tests, and whole rounds between them and a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache

import torch
from torch import Tensor

from fedkl.masking import (
    Call,
    Contribution,
    Layout,
    MaskedSum,
    Member,
    MemberKeys,
    Memory,
    Rules,
    SealedRoster,
    SealedSum,
    Upload,
    new_roster,
)
from fedkl.update import TensorSpec

TODAY = date(2026, 11, 29)
RUN = bytes(range(16))
SPECS = {
    "weight": TensorSpec(shape=(40, 11), dtype=torch.float32),
    "bias": TensorSpec(shape=(7,), dtype=torch.float32),
    "batches": TensorSpec(shape=(), dtype=torch.int64),
    "flag": TensorSpec(shape=(2,), dtype=torch.bool),
}


@dataclass
class Cohort:
    """Members of one roster, and what they trained."""

    sealed: SealedRoster
    keys: Sequence[MemberKeys]
    members: dict[str, Member]
    layout: Layout
    updates: dict[str, Contribution] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all members, sorted."""
        return tuple(self.members)

    def call(self, *, round: int = 0, attempt: int = 0, cohort: Sequence[str] | None = None) -> Call:
        """A call to these members, all if not told otherwise."""
        return Call(run=RUN, round=round, attempt=attempt, cohort=tuple(cohort or self.names))

    def train(self, *, seed: int = 0) -> None:
        """Draws an update for every member."""
        self.updates = {
            name: Contribution(
                tensors=drawn(seed + place), samples=100 + place, metrics={"loss": 0.5 * place}
            )
            for place, name in enumerate(self.names)
        }

    def uploads(self, call: Call, *, of: Sequence[str] | None = None) -> dict[str, Upload]:
        """Uploads of members that are there."""
        present = call.cohort if of is None else of
        return {name: self.members[name].upload(call, self.updates[name]) for name in present}

    def server(self, call: Call) -> MaskedSum:
        """A server's attempt."""
        rules = self.sealed.roster.rules
        return MaskedSum(call, layout=self.layout, mode=rules.mode, minimum=rules.minimum)

    def summed(self, call: Call, *, of: Sequence[str] | None = None) -> SealedSum:
        """The sum of members that are there, reveals included."""
        server = self.server(call)
        for upload in self.uploads(call, of=of).values():
            server.offer(upload)
        if self.sealed.roster.rules.mode != "blind":
            for name in server.listed:
                server.offer_reveal(self.members[name].reveal(server.list_for(name)))
        return server.sealed()

    def expected(self, name: str, *, of: Sequence[str] | None = None) -> Tensor:
        """The weighted mean of a tensor, float64."""
        found = [self.updates[member] for member in of or self.names]
        samples = sum(update.samples for update in found)
        total: Tensor = sum(update.tensors[name].double() * update.samples for update in found)  # type: ignore[assignment]
        return total / samples


def drawn(seed: int) -> dict[str, Tensor]:
    """Tensors of `SPECS`, in the range of trained weights."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(40, 11, generator=generator) * 0.1,
        "bias": torch.randn(7, generator=generator) * 0.1,
        "batches": torch.tensor(5),
        "flag": torch.tensor([True, False]),
    }


@lru_cache
def keys_of(size: int) -> tuple[MemberKeys, ...]:
    """Keys of members; the same for all tests, as making them takes long."""
    return tuple(MemberKeys.new(f"h{place:03}", today=TODAY) for place in range(size))


def member_of(sealed: SealedRoster, keys: MemberKeys, layout: Layout, memory: Memory | None = None) -> Member:
    """A member with a memory of its own."""
    return Member(
        sealed.opened(keys),
        layout=layout,
        memory=memory or Memory(),
        booleans={"flag": torch.tensor([True, False])},
        today=TODAY,
    )


def new_cohort(size: int, *, accept: bool = True, **rules: object) -> Cohort:
    """A cohort whose members have accepted a first model and trained."""
    keys = keys_of(size)
    sealed = new_roster(
        name="study",
        cards=[each.card() for each in keys],
        rules=Rules(**rules),  # type: ignore[arg-type]
        signer=keys[0],
        today=TODAY,
    )
    layout = Layout(specs=SPECS, words=sealed.roster.words, metrics=("loss",))
    members = {each.name: member_of(sealed, each, layout) for each in keys}
    cohort = Cohort(sealed=sealed, keys=keys, members=members, layout=layout)
    if accept:
        first: Mapping[str, Tensor] = drawn(1000)
        for member in members.values():
            member.accept_model(RUN, first)
    cohort.train()
    return cohort
