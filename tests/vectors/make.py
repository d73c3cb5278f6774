"""Writes the good vectors of this version: ``python -m tests.vectors.make FOLDER [KIND …]``.

They are written once, when a format is new, and then committed under a folder of their own: never
again, for they show that later versions still read what this one wrote.
"""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import date
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import fedkl
from fedkl import Key, experiments, lockfile, modelfile, study
from fedkl.attacks.generators.files import ConditionalGenerator, GeneratorInfo, save_generator
from fedkl.auditing.run import _Folder
from fedkl.config import AttackConfig, DataConfig, ModelConfig, TrainConfig
from fedkl.custody import ClientStore
from fedkl.custody.backup import write_backup
from fedkl.custody.journal import Journal
from fedkl.defenses import KeyLock
from fedkl.federated import Checkpoints, FederatedTraining, LocalTraining
from fedkl.masking import Call, Contribution, Layout, MaskedSum, Member, MemberFile, Rules
from fedkl.masking.exchange import found_cohort, new_member
from fedkl.masking.schedule import Secret
from fedkl.masking.sums import sum_tensors
from fedkl.masking.texts import card_values
from fedkl.masking.update_file import UpdateFile
from fedkl.privacy import LedgerEntry, LedgerFile
from fedkl.recordingfile import Recording
from fedkl.runs import RunDirectory
from fedkl.update import TensorSpec
from tests.auditing.audits import audit, finding, not_run
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


MADE = date(2026, 11, 29)
"""When members and their cohort were made: read them with this date."""

RUN = bytes(range(16))
MEMBERS = ("ward-a", "ward-b", "ward-c")


def trained(place: int) -> dict[str, torch.Tensor]:
    """The model that masked sums are of (place 0), and what each member made of it."""
    return {"weight": torch.arange(12).reshape(3, 4) / 8 + place, "batches": torch.tensor(5 * place)}


def member_of(membership, memory) -> Member:
    """A member in rounds of `trained`."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in trained(0).items()}
    layout = Layout(specs=specs, words=membership.roster.words, metrics=("loss",))
    return Member(membership, layout=layout, memory=memory, today=MADE)


def secrets_of(file: MemberFile) -> dict[str, torch.Tensor]:
    """All secrets of a member's file."""
    hidden = {**file.keys.seeds, "memory": file._content.memory_key}
    hidden |= {f"cohort/{name}": membership.secret for name, membership in file.cohorts.items()}
    return {name: lockfile.byte_tensor(secret.reveal()) for name, secret in hidden.items()}


def text_digest(value: object) -> str:
    """Of what JSON has."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _members(folder: Path) -> dict:
    """A member's secret file, memory and card, its cohort, and a sum that it has not opened yet."""
    cards = [new_member(name, folder=folder, passphrase=PASSPHRASE, today=MADE)[1] for name in MEMBERS]
    rules = Rules(mode="both", max_samples=1000)
    files = [MemberFile.open(folder / f"{name}.secret", passphrase=PASSPHRASE) for name in MEMBERS]
    path = folder / "study.cohort"
    sealed = found_cohort(path, cards=cards, rules=rules, signer=files[0].keys, today=MADE)
    members = {}
    for file in files:
        file.join(sealed, today=MADE, fingerprint=sealed.roster.fingerprint)
        members[file.keys.name] = member_of(file.membership(), file.memory())
    call = Call(run=RUN, round=0, attempt=0, cohort=MEMBERS)
    server = MaskedSum(call, layout=members["ward-a"].layout, mode="both", minimum=3)
    for place, member in enumerate(members.values(), start=1):
        member.accept_model(RUN, trained(0))
        given = Contribution(tensors=trained(place), samples=place, metrics={"loss": place / 4})
        server.offer(member.upload(call, given))
    for member in members.values():
        server.offer_reveal(member.reveal(server.list_for(member.name)))
    total = server.sealed()
    safetensors.torch.save_file(sum_tensors(total), folder / "study.sum")
    values = {
        "ward-a.secret": digest(secrets_of(files[0])),
        "ward-a.memory": text_digest(files[0].memory().to_json()),
        "ward-a.member": text_digest(card_values(files[0].keys.card())),
        "study.cohort": f"{sealed.roster.digest.hex()} {sealed.roster.fingerprint}",
        "study.sum": digest(members["ward-b"].open(total).tensors),
    }
    for file in files:
        file.close()
        kept = file.keys.name == "ward-a"
        ends = (".secret.lock",) if kept else (".secret.lock", ".secret", ".memory", ".member")
        for end in ends:
            (folder / f"{'.' if 'lock' in end else ''}{file.keys.name}{end}").unlink()
    return values


def _recording(folder: Path) -> dict:
    about = {"round": 1, "config": {"lr": 0.1}, "metrics": {"metrics": {"num-examples": 8}}}
    Recording(received=trained(0), sent=trained(1), about=about).write(folder / "recording")
    return {"recording": digest(trained(1))}


def _ledger(folder: Path) -> dict:
    LedgerFile(folder / "ledger.jsonl", delta=1e-5).append(LedgerEntry(round=0, epsilon={"client-0": 0.5}))
    return {"ledger.jsonl": 0.5}


KEY, CALL = Secret(bytes(range(32))), Call(run=RUN, round=0, attempt=0, cohort=MEMBERS)
"""Of the update of a member."""


def _update_file(folder: Path) -> dict:
    path = folder / "ward-a.study.update"
    UpdateFile(path, key=KEY).write(CALL, Contribution(tensors=trained(1), samples=1, metrics={"loss": 0.25}))
    return {path.name: digest(trained(1))}


def _calls(folder: Path) -> dict:
    from fedkl.flower.calls import Calls

    calls = Calls(folder / "calls", None)
    return {"calls": [calls.next(), calls.run.hex()]}


def _audit(folder: Path) -> dict:
    kept = _Folder(folder / "audit")
    kept.path.mkdir()
    made = audit(finding(), not_run())
    kept.begin(made.settings)
    kept.append(*made.findings, *made.not_run)
    kept.finish(60.0)
    return {"audit": text_digest(kept.audit().model_dump(mode="json"))}


def _table(folder: Path) -> dict:
    study.claim(folder / "table", table="table6", places=[])
    return {"table": "table6"}


def _generator(folder: Path) -> dict:
    info = GeneratorInfo(dataset="noise", classes=2, channels=1, latent=4, width=1)
    generator = seeded(lambda: ConditionalGenerator(info))
    save_generator(generator, folder / "noise.generator")
    return {"noise.generator": digest({n: t.half() for n, t in generator.state_dict().items()})}


def _begun(folder: Path) -> dict:
    RunDirectory.create(folder / "run", config=TrainConfig(), version="0.1.0")
    return {"run": None}


def _store(folder: Path) -> dict:
    store = ClientStore(folder / "store", passphrase=PASSPHRASE)
    with store.client("ward-3", model=net(), defense=DEFENSE) as client:
        store.save(client)
        return {"store": client.ledger.saved}


def _custody(folder: Path) -> dict:
    store = ClientStore(folder / "store", passphrase=PASSPHRASE)
    with store.client("ward-3", model=net(), defense=DEFENSE):
        pass
    file = folder / "ward-3.backup"
    write_backup(folder / "store", "ward-3", out=file, passphrase=PASSPHRASE, backup_passphrase=PASSPHRASE)
    return {file.name: 1, "store": len(Journal(folder / "store" / "ward-3").read()[0])}


KINDS = {
    "keys": _keys,
    "locks": _locks,
    "updates": _updates,
    "checkpoint": _checkpoint,
    "rounds": _rounds,
    "models": _models,
    "runs": _runs,
    "members": _members,
    "recording": _recording,
    "ledger": _ledger,
    "update-file": _update_file,
    "calls": _calls,
    "audit": _audit,
    "table": _table,
    "generator": _generator,
    "begun": _begun,
    "store": _store,
    "custody": _custody,
}


def main() -> None:
    """Writes all of them, or those that are named, and ``good.json`` with the digest of each."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    values = {}
    for kind in sys.argv[2:] or KINDS:
        values |= KINDS[kind](folder)
    (folder / "good.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
