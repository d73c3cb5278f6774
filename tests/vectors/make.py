"""Writes the good vectors of this version: ``python -m tests.vectors.make FOLDER``.

They are written once, when a format is new, and then committed under a folder of their own: never
again, for they show that later versions still read what this one wrote.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

import fedkl
from fedkl import Key, experiments, modelfile
from fedkl.config import AttackConfig, DataConfig, ModelConfig, TrainConfig
from fedkl.defenses import KeyLock
from fedkl.federated import Checkpoints, FederatedTraining, LocalTraining
from tests.federated.setting import TwoNorms, everything, federation, sample, seeded

PASSPHRASE = "correct horse"
DEFENSE = KeyLock(key_length=8)


def net() -> nn.Module:
    """The model that the locks are of."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))


def small_federation():
    """The federation that the checkpoint is of."""
    return federation(sample(), DEFENSE, model=seeded(TwoNorms), clients=2, rounds=4, server=_server())


def _server():
    from fedkl.federated import ServerSGD

    return ServerSGD()


def digest(tensors) -> str:
    """One text for names, shapes, kinds and bytes of tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _keys(folder: Path) -> dict:
    values = {}
    for distribution in ("normal", "uniform"):
        key = Key.generate(length=16, distribution=distribution)
        for passphrase in (PASSPHRASE, None):
            name = f"{distribution}-{'encrypted' if passphrase else 'plain'}.key"
            fedkl.save_key(key, folder / name, passphrase=passphrase)
            values[name] = digest({"key": key.reveal()})
    return values


def _locks(folder: Path) -> dict:
    values = {}
    for name, options in {
        "first": {},
        "all-relu": {"layers": ["1"], "activation": "relu", "initialization": "published"},
        "private-head": {"private": ["head"]},
        "shared-statistics": {"share_statistics": True},
    }.items():
        lock = fedkl.lock(net(), key=Key.generate(length=8), **options)
        lock.model(torch.rand(8, 4))
        memory = {"momentum/0.weight": torch.rand(6, 4)}
        lock.save(folder / f"{name}.lock", passphrase=PASSPHRASE, memory=memory)
        tensors = {**lock.private_state(), **memory, "key": lock.key.reveal()}
        values[f"{name}.lock"] = digest(tensors)
    return values


def _updates(folder: Path) -> dict:
    lock = fedkl.lock(net(), key=Key.generate(length=8))
    loss = lock.model(torch.rand(8, 4)).sum()
    sent = {"weights": lock.public_state(), "gradient": lock.public_gradient(loss)}
    values = {}
    for kind, tensors in sent.items():
        update = lock.public_update(tensors, kind=kind, num_samples=8, round=3)
        (folder / f"{kind}.update").write_bytes(update.to_bytes())
        values[f"{kind}.update"] = digest(update.tensors)
    return values


def _checkpoint(folder: Path) -> dict:
    run = small_federation()
    store = Checkpoints(folder / "checkpoint", passphrase=PASSPHRASE)
    for round in range(2):
        run.run_round(round)
        store.save(run, round=round + 1)
    return {"checkpoint": digest(everything(run))}


def _rounds(folder: Path) -> dict:
    from fedkl.flower.round_files import RoundFiles, SavedRound

    files = RoundFiles(folder / "rounds")
    for number in (1, 2):
        arrays = {"0.weight": torch.rand(2, 3), "1.num_batches_tracked": torch.tensor(number)}
        memory = {"momentum_vector/dict/0.weight": torch.rand(2, 3)}
        files.save(SavedRound(round=number, arrays=arrays, memory=memory))
    files.save_history({"train_metrics_clientapp": {1: {"loss": 2.5}, 2: {"loss": 1.5}}})
    return {"rounds": digest({**arrays, **memory})}


def _models(folder: Path) -> dict:
    lock = fedkl.lock(net(), key=Key.generate(length=8))
    modelfile.write_model(folder / "model.safetensors", lock.public_state(), rounds=3)
    lock.save(folder / "client.lock", passphrase=PASSPHRASE)
    output = lock.model.eval()(torch.linspace(-1, 1, 20).reshape(5, 4)).detach()
    return {"model.safetensors": digest(lock.public_state()), "output": output.tolist()}


def _runs(folder: Path) -> dict:
    data, model = DataConfig(train_images=64, test_images=120), ModelConfig()
    training = FederatedTraining(clients=2, rounds=2, local=LocalTraining(batch_size=32))
    train = TrainConfig(data=data, model=model, defense=DEFENSE, training=training)
    attack = AttackConfig(attack={"type": "prior-only"}, auxiliary=20, arms=("no-norm",), trials=2)
    for name, config in (("train", train), ("attack", attack)):
        experiments.run(config, out=folder / name)
        for large in (*(folder / name).glob("checkpoints/*"), folder / name / "global.safetensors"):
            large.unlink(missing_ok=True)
    return {"train": None, "attack": None}


def main() -> None:
    """Writes all of them, and ``good.json`` with the digest of each."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    values = {}
    for write in (_keys, _locks, _updates, _checkpoint, _rounds, _models, _runs):
        values |= write(folder)
    (folder / "good.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
