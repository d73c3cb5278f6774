"""The members of a masked federation in one process: who they are, and how they are kept in a checkpoint."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

from torch import Tensor

from fedkl.aggregation.base import RoundPlan
from fedkl.errors import ConfigError, MaskingError
from fedkl.lockfile import byte_tensor, bytes_of
from fedkl.masking import (
    Layout,
    Member,
    MemberKeys,
    Memory,
    Rules,
    Secret,
    new_roster,
)
from fedkl.parsing import parse_json_object
from fedkl.types import NamedTensors
from fedkl.update import TensorSpec


@dataclass(kw_only=True)
class Cohort:
    """Who the members are: their keys and memories.

    Attributes:
        rules: What they agreed on.
        clients: Their names.
        run: The run's name.
        today: When their cards and roster were made; they never expire in a simulation.
        secret: The cohort's key.
        keys: By member.
        memories: By member.
    """

    rules: Rules
    clients: tuple[str, ...]
    run: bytes
    today: date
    secret: Secret
    keys: dict[str, MemberKeys]
    memories: dict[str, Memory]

    @classmethod
    def new(cls, rules: Rules, clients: Iterable[str], *, today: date) -> Cohort:
        """New keys for all."""
        keys = {name: MemberKeys.new(name, today=today) for name in clients}
        return cls(
            rules=rules,
            clients=tuple(keys),
            run=secrets.token_bytes(16),
            today=today,
            secret=Secret(secrets.token_bytes(32)),
            keys=keys,
            memories={name: Memory() for name in keys},
        )

    def members(self, plan: RoundPlan) -> dict[str, Member]:
        """Members by name, for updates of this plan."""
        sealed = new_roster(
            name="federation",
            cards=[keys.card() for keys in self.keys.values()],
            rules=self.rules,
            signer=next(iter(self.keys.values())),
            today=self.today,
            secret=self.secret,
        )
        layout = Layout(specs=plan.schema.specs, words=sealed.roster.words)
        booleans = {name: plan.state[name] for name in layout.booleans}
        model = {name: TensorSpec.of(tensor) for name, tensor in plan.state.items()}
        return {
            name: Member(
                sealed.opened(keys),
                layout=layout,
                memory=self.memories[name],
                booleans=booleans,
                model=model,
                today=self.today,
            )
            for name, keys in self.keys.items()
        }

    def secrets(self) -> dict[str, Tensor]:
        """All that makes the same cohort again."""
        about = {
            "run": self.run.hex(),
            "today": self.today.isoformat(),
            "memories": {name: memory.to_json() for name, memory in self.memories.items()},
        }
        found = {"about": byte_tensor(json.dumps(about).encode()), "key": byte_tensor(self.secret.reveal())}
        for name, keys in self.keys.items():
            for kind, seed in keys.seeds.items():
                found[f"member/{name}/{kind}"] = byte_tensor(seed.reveal())
        return found

    @classmethod
    def restored(cls, rules: Rules, clients: Iterable[str], secrets: NamedTensors) -> Cohort:
        """The cohort that `secrets` describes.

        Raises:
            ConfigError: It is of other clients, or damaged.
        """
        try:
            about = parse_json_object(bytes_of(secrets["about"]))
            today = date.fromisoformat(about["today"])
            keys = {}
            for name in clients:
                seeds = {
                    kind: Secret(bytes_of(secrets[f"member/{name}/{kind}"])) for kind in MemberKeys.SEEDS
                }
                keys[name] = MemberKeys(name=name, expires=MemberKeys.expiry(today), seeds=seeds)
            memories = {name: Memory.from_json(about["memories"][name]) for name in keys}
            run, secret = bytes.fromhex(about["run"]), Secret(bytes_of(secrets["key"]))
        except (KeyError, TypeError, ValueError, MaskingError) as error:
            raise ConfigError("The checkpoint's masks are of another federation, or damaged.") from error
        return cls(
            rules=rules,
            clients=tuple(keys),
            run=run,
            today=today,
            secret=secret,
            keys=keys,
            memories=memories,
        )
