"""A masked upload, as an attacker of single updates meets it: random words, taken for numbers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fedkl.aggregation import SeenUpload
from fedkl.defenses.base import Defense, register_defense
from fedkl.errors import ConfigError, shown
from fedkl.masking import (
    Call,
    Contribution,
    Layout,
    Member,
    MemberKeys,
    Membership,
    Memory,
    Mode,
    Rules,
    new_roster,
)
from fedkl.masking.words import MAX_SAMPLES
from fedkl.protocol import Sending
from fedkl.update import PublicUpdate

_DAY = date(2026, 1, 1)  # of a cohort that is forgotten as soon as its upload is there
_SIZE = 1e-2  # of numbers that a server would expect in a gradient; attacks that look at angles ignore it


@register_defense
@dataclass(frozen=True, kw_only=True)
class MaskedUpload(Defense):
    """What a server has of one client whose updates are masked; see docs/masked.md.

    For attacks only. A training adds masked updates up: ``fedkl train --masking blind``.

    Attributes:
        mode: Which masks. A single upload looks the same in all modes; sums of pairwise ones are in the open,
            and are attacked as sums of undefended clients (``cohort``).
    """

    plain: ClassVar[str] = "masks"
    type: Literal["masked"] = "masked"
    mode: Mode = "blind"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            expected = ", ".join(get_args(Mode))
            raise ConfigError(f"MaskedUpload: mode: expected one of {expected}, got {shown(self.mode)}.")

    def check_training(self) -> None:
        """Refuses: words are no numbers to be averaged.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "defense 'masked' is what an attacker sees of single uploads, and cannot be trained with. Use "
            f"fedkl train --masking {self.mode} (training.aggregation), over any defense."
        )

    def transform(self, update: PublicUpdate, *, client: Sending) -> PublicUpdate:
        """The update as a member of a new cohort uploads it: its change is its words, taken for numbers."""
        members = _memberships(self.mode)
        layout = Layout(specs=update.schema.specs, words=members[0].roster.words)
        booleans = {name: update.tensors[name] for name in layout.booleans}
        member = Member(members[0], layout=layout, memory=Memory(), booleans=booleans, today=_DAY)
        run = secrets.token_bytes(16)
        member.accept_model(run, update.tensors)
        call = Call(run=run, round=0, attempt=0, cohort=members[0].roster.members)
        contribution = Contribution(tensors=update.tensors, samples=min(update.num_samples, MAX_SAMPLES))
        seen = SeenUpload(clients=(member.name,), upload=member.upload(call, contribution), layout=layout)
        numbers = {name: _SIZE * tensor for name, tensor in seen.as_numbers().items()}
        if update.kind == "weights":
            numbers = {name: client.received[name] + tensor for name, tensor in numbers.items()}
        return replace(update, tensors={**update.tensors, **numbers})

    def imitate_transform(
        self, changes: Mapping[str, Tensor], *, clients: Sequence[Sending], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """The informed attacker masks the updates of clients that it plays, with masks of its own."""
        return {
            name: _SIZE * (2 * torch.rand(tensor.shape, generator=generator).to(tensor) - 1)
            for name, tensor in changes.items()
        }

    @classmethod
    def variants(cls) -> tuple[Defense, ...]:
        """Blind masks."""
        return (cls(),)

    def describe(self) -> str:
        """Which masks."""
        return f"{self.type} ({self.mode})"


@cache
def _memberships(mode: Mode) -> tuple[Membership, ...]:
    """A cohort of three; their masks are never used twice, as every upload has a nonce and run of its own."""
    keys = [MemberKeys.new(f"client-{place}", today=_DAY) for place in range(3)]
    cards = [each.card() for each in keys]
    sealed = new_roster(name="audit", cards=cards, rules=Rules(mode=mode), signer=keys[0], today=_DAY)
    return tuple(sealed.opened(each) for each in keys)
