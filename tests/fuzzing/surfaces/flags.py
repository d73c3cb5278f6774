"""The command line: flags, and fields that are set by `--set`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fedkl import config as configs
from fedkl import experiment_flags
from fedkl.errors import ConfigError
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import Surface

_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "seed": ("seed", int),
    "data": ("data.name", str),
    "root": ("data.root", str),
    "model": ("model.name", str),
    "init": ("model.initialization", str),
    "clients": ("training.clients", int),
    "rounds": ("training.rounds", int),
    "lr": ("training.local.lr", float),
    "algorithm": ("training.local.algorithm", str),
    "augmentation": ("training.local.augmentation", str),
    "device": ("execution.device", str),
    "trials": ("trials", int),
    "arms": ("arms", lambda text: text.split(",")),
}
_SEEDS = (
    "train\nset training.local.proximal=0.01\nset lock=1\npartition shards:2\n",
    "train\ndefense keylock\nlayers all\nlock published\nclients 4\nlr 0.1\nset data.size=28\n",
    "train\ndefense public-norm\nlock default\nset defense.like.layers=['a', 'b']\n",
    "train\npartition dirichlet:0.1\nmodel lenet\ndata mnist\nroot /tmp\nalgorithm fedsgd\ndevice cpu\n",
    "train\npartition iid\nset training.schedule={type='constant'}\nset training.server.type=adam\nseed 3\n",
    "attack\nattack ig\nlayers first\ntrials 2\narms lock,public-norm\nset attack.iterations=10\n",
    "attack\nattack dlg\nlock published\nset lock.layers=all\nset local.steps=2\n",
    "attack\nattack idlg\nset batch_size=1\nset networks=one\nset updates_per_client=2\ninit default\n",
    "attack\nset attack={type='grnn'}\nset labels_known=false\nset arms=['lock']\n",
)


class Flags(Surface):
    """`from_flags` and `partition_of`; a line is a flag and its value, in which a zero byte is a newline."""

    name = "flags"
    form = "text"
    quick = 250
    target = "fedkl.experiment_flags.from_flags"

    def seeds(self) -> list[bytes]:
        """Command lines of trainings and attacks."""
        return [seed.encode() for seed in _SEEDS]

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Reads the lines as the command line would."""
        kind, *lines = os.fsdecode(data).split("\n")  # arguments come with lone surrogates for odd bytes
        flags = [line.replace("\0", "\n").partition(" ")[::2] for line in lines]
        values = dict(flags)
        partition = values.get("partition")
        if partition is not None:
            self.attempt(lambda: experiment_flags.partition_of(partition))
        experiment = experiment_flags.from_flags(
            "attack" if kind == "attack" else "train",
            file=None,
            fields=_fields(values),
            defense=values.get("defense"),
            attack=values.get("attack"),
            lock=values.get("lock"),
            layers=values.get("layers"),
            settings=[value for flag, value in flags if flag == "set"],
        )
        configs.dump(experiment)


def _fields(values: dict[str, str]) -> dict[str, Any]:
    """What the command line's own parser has let through, in its types."""
    fields: dict[str, Any] = {}
    for flag, (place, kind) in _FIELDS.items():
        try:
            fields[place] = kind(values[flag])
        except (KeyError, ValueError):
            continue
    try:
        fields["training.partition"] = experiment_flags.partition_fields(values["partition"])
    except (KeyError, ConfigError):
        pass
    return fields
