"""The masked sum that a server keeps of a round, and how a member opens it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from fedkl.errors import ConfigError, MaskingError
from fedkl.flower.round_files import SavedRound
from fedkl.lockfile import byte_tensor, bytes_of
from fedkl.masking import Layout, Member, MemberFile, Memory, Mode
from fedkl.masking.sums import sum_of
from fedkl.parsing import parse_json_object
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a checkpoint says of the sum in it.

    Attributes:
        mode: Which masks.
        server_model: Whether members take what the server makes of the sum.
        metrics: That are averaged in it.
    """

    mode: Mode = "blind"
    server_model: bool = False
    metrics: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"masks": byte_tensor(json.dumps(vars(self)).encode())}

    @classmethod
    def of(cls, tensors: NamedTensors) -> Kept:
        """What was kept; before the first round, that the server can read nothing.

        Raises:
            ConfigError: It is damaged, or was written without masks.
        """
        if not tensors:
            return cls()
        try:
            about = parse_json_object(bytes_of(tensors["masks"]))
            mode, server_model, metrics = about["mode"], about["server_model"], about["metrics"]
            fine = mode in get_args(Mode) and type(server_model) is bool
            if not fine or not all(isinstance(name, str) for name in metrics):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("The checkpoint's last sum is damaged.") from error
        return cls(mode=mode, server_model=server_model, metrics=tuple(metrics))


def is_sealed(saved: SavedRound) -> bool:
    """Whether only members can read what a round of a server gave."""
    return Kept.of(saved.kept).mode != "pairwise" if saved.kept else False


def opened_by(file: MemberFile, saved: SavedRound) -> dict[str, Tensor]:
    """The public tensors that a round of a server gave, opened by a member.

    Args:
        file: The member's; it has joined the roster of that round.
        saved: The round; see `is_sealed`.

    Raises:
        MaskingError: It is of another roster, or was altered.
        ConfigError: What was kept is damaged.
    """
    total, about = sum_of(saved.kept), Kept.of(saved.kept)
    if total is None:
        raise ConfigError("The checkpoint's last sum is damaged.")
    specs = {name: TensorSpec.of(tensor) for name, tensor in saved.arrays.items()}
    problem: MaskingError | None = None
    for membership in file.cohorts.values():
        layout = Layout(specs=specs, words=membership.roster.words, metrics=about.metrics)
        booleans = {name: saved.arrays[name] for name in layout.booleans}
        try:
            roster = membership.roster  # what has expired since is still read: nothing is sent
            good = min(roster.expires, *(card.expires for card in roster.cards))
            member = Member(membership, layout=layout, memory=Memory(), booleans=booleans, today=good)
            return member.read(total).tensors
        except MaskingError as error:
            problem = error
    raise MaskingError(
        f"{file.path}: this member cannot open the sum: it is of another cohort or epoch, or was altered."
    ) from problem
