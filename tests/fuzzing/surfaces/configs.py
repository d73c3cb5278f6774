"""TOML files of experiments."""

from __future__ import annotations

from fedkl import config as configs
from fedkl.attacks import ATTACKS
from fedkl.config import AttackConfig, TrainConfig
from fedkl.data import Dirichlet, Shards
from fedkl.defenses import KeyLock, PrivateLayers, PrivateNorm, PublicNorm
from fedkl.federated import FederatedTraining, ServerAdam, StepSchedule
from tests.fuzzing.contract import Finding
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import Surface

_DEFENSES = (KeyLock(layers=("a", "b")), PublicNorm(), PrivateNorm(), PrivateLayers())
_TRAININGS = (
    FederatedTraining(partition=Shards(per_client=2), server=ServerAdam()),
    FederatedTraining(partition=Dirichlet(alpha=0.5), schedule=StepSchedule(), cohort=2, clients=4),
)


class Configs(Surface):
    """`config.load`; what is accepted can be written, and is the same when it is read again."""

    name = "configs"
    form = "toml"
    quick = 250
    target = "fedkl.config.load"

    def seeds(self) -> list[bytes]:
        """Every attack, defense and partition once."""
        attacks = [AttackConfig(attack=attack()) for attack in ATTACKS]
        trains = [TrainConfig(defense=defense) for defense in _DEFENSES]
        trains += [TrainConfig(training=training) for training in _TRAININGS]
        short = [b'type = "train"\nseed = 1\n', b'type = "attack"\n[lock]\nlayers = "all"\n']
        return [configs.dump(config).encode() for config in (*trains, *attacks)] + short

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Loads the file, and loads it once more as a run directory would keep it."""
        path = sandbox.place / "config.toml"
        path.write_bytes(data)
        config = configs.load(path)
        path.write_bytes(configs.dump(config).encode())
        if configs.load(path) != config:
            raise Finding("a configuration is another one after it was written and read")
