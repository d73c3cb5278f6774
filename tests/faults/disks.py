"""Writes every kind of file on a disk that is full or read-only.

``python -m tests.faults.disks FOLDER FAULT`` runs in a user namespace of its own, where it may mount; see
test_disks.py. What came of it is JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fedkl
from fedkl import Key, lockfile, modelfile
from fedkl.attacks.generators.files import ConditionalGenerator, GeneratorInfo, load_generator, save_generator
from fedkl.auditing.results import Audit
from fedkl.auditing.run import _Folder
from fedkl.config import TrainConfig
from fedkl.custody import ClientStore
from fedkl.defenses import KeyLock
from fedkl.errors import FedKLError
from fedkl.federated import Checkpoints
from fedkl.masking import Contribution, MemberFile, MemberKeys, Rules
from fedkl.masking.exchange import change_cohort, found_cohort, new_member, read_cohort
from fedkl.privacy import LedgerEntry, LedgerFile
from fedkl.recordingfile import Recording
from fedkl.runs import RunDirectory
from tests.auditing.audits import audit, finding
from tests.federated.setting import everything
from tests.vectors.make import CALL, digest, small_federation, trained

PASSPHRASE = "correct horse"
TODAY = date(2026, 11, 29)
SIZE = 2**21
"""Bytes of the disk."""


class Case(NamedTuple):
    """What is there before, how it is written again, and what must be the same after a failure."""

    write: Callable[[], Any]
    read: Callable[[], Any]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def key(folder: Path) -> Case:
    path = folder / "a.key"
    fedkl.save_key(Key.generate(), path, passphrase=PASSPHRASE)
    return Case(
        lambda: fedkl.save_key(Key.generate(), path, passphrase=PASSPHRASE),
        lambda: fedkl.load_key(path, passphrase=PASSPHRASE).reveal().tolist(),
    )


def lock(folder: Path) -> Case:
    path, plain = folder / "a.lock", net()
    fedkl.lock(plain).save(path, passphrase=PASSPHRASE)
    return Case(
        lambda: fedkl.lock(plain).save(path, passphrase=PASSPHRASE),
        lambda: fedkl.load_lock(path, plain, passphrase=PASSPHRASE).key.reveal().tolist(),
    )


def store(folder: Path) -> Case:
    kept, plain = ClientStore(folder, passphrase=PASSPHRASE), net()

    def used(*, save: bool) -> list[float]:
        with kept.client("a", model=plain, defense=KeyLock()) as client:
            if save:
                kept.save(client)
            return client.lock.key.reveal().tolist()

    used(save=False)
    return Case(lambda: used(save=True), lambda: used(save=False))


def birth(folder: Path) -> Case:
    kept, plain = ClientStore(folder, passphrase=PASSPHRASE), net()

    def born() -> None:
        with kept.client("a", model=plain, defense=KeyLock()):
            pass

    return Case(born, lambda: [path.name for path in folder.rglob("*.fedkl")])


def member(folder: Path) -> Case:
    return Case(
        lambda: new_member("a", folder=folder, passphrase=PASSPHRASE, today=TODAY),
        lambda: [path.name for path in folder.glob("a.*")],
    )


def _members(folder: Path) -> tuple[list[MemberFile], Path]:
    files = []
    for name in "abc":
        keys = MemberKeys.new(name, today=TODAY)
        files.append(MemberFile.create(folder / f"{name}.secret", keys, passphrase=PASSPHRASE))
        (folder / f"{name}.member").write_bytes(_card(keys))
    path = folder / "study.cohort"
    cards = [folder / f"{name}.member" for name in "abc"]
    sealed = found_cohort(path, cards=cards, rules=Rules(), signer=files[0].keys, today=TODAY)
    for file in files:
        file.join(sealed, today=TODAY, fingerprint=sealed.roster.fingerprint)
    return files, path


def _card(keys: MemberKeys) -> bytes:
    from fedkl.masking.texts import card_to_bytes

    return card_to_bytes(keys.card())


def _reopened(file: MemberFile) -> MemberFile:
    file.close()
    return MemberFile.open(file.path, passphrase=PASSPHRASE)


def memory(folder: Path) -> Case:
    file = _members(folder)[0][0]
    kept = file.memory()
    kept.sets["a"] = "b"
    kept.keep(kept)

    def read() -> Any:
        file.close()
        with MemberFile.open(file.path, passphrase=PASSPHRASE) as again:
            return again.memory().to_json(), again.membership().secret.reveal().hex()

    def write() -> None:
        with MemberFile.open(file.path, passphrase=PASSPHRASE) as again:
            changed = again.memory()
            changed.sets["c"] = "d"
            changed.keep(changed)

    read()
    return Case(write, read)


def cohort(folder: Path) -> Case:
    files, path = _members(folder)
    return Case(
        lambda: change_cohort(path, add=(), remove=(), member=files[0], today=TODAY),
        lambda: read_cohort(path).roster.digest.hex(),
    )


def update(folder: Path) -> Case:
    file = _members(folder)[0][0].update_file()
    file.write(CALL, Contribution(tensors=trained(1), samples=1, metrics={}))
    return Case(
        lambda: file.write(CALL, Contribution(tensors=trained(2), samples=1, metrics={})),
        lambda: digest(file.read(CALL).tensors),
    )


def checkpoint(folder: Path) -> Case:
    run = small_federation()
    kept = Checkpoints(folder, passphrase=PASSPHRASE)
    run.run_round(0)
    kept.save(run, round=1)
    run.run_round(1)

    def read() -> Any:
        again = small_federation()
        rounds = Checkpoints(folder, passphrase=PASSPHRASE).restore(again, going_on=False)
        return rounds, digest(everything(again))

    return Case(lambda: kept.save(run, round=2), read)


def model(folder: Path) -> Case:
    path = folder / "model.safetensors"
    modelfile.write_model(path, trained(0), rounds=1)
    return Case(
        lambda: modelfile.write_model(path, trained(1), rounds=2, replace=True),
        lambda: digest(modelfile.read_model(path)),
    )


def run_directory(folder: Path) -> Case:
    RunDirectory.create(folder / "run", config=TrainConfig(), version="0")
    record = {"event": "partition", "class_counts": [[1] * 4000]}

    def write() -> None:
        run = RunDirectory.create(folder / "run", config=TrainConfig(), version="0")
        run.append(record)
        run.finish({"seconds": 1.0})

    def read() -> Any:
        run = RunDirectory.open(folder / "run")
        return run.config.model_dump(mode="json"), len(list(run.results())), run.summary

    return Case(write, read)


def privacy_ledger(folder: Path) -> Case:
    file = LedgerFile(folder / "ledger.jsonl", delta=1e-5)
    file.append(LedgerEntry(round=0, epsilon={"a": 0.5}))
    many = {f"client-{number}": 0.5 for number in range(1000)}

    def read() -> Any:  # as a person would, for `entries` mends the last line, which needs a disk
        lines = (folder / "ledger.jsonl").read_bytes()
        return len(lines[: lines.rfind(b"\n") + 1].splitlines())

    def write() -> None:
        file.entries(rounds=1)
        file.append(LedgerEntry(round=1, epsilon=many))

    return Case(write, read)


def flower_round(folder: Path) -> Case:
    from fedkl.flower.round_files import RoundFiles, SavedRound

    files = RoundFiles(folder)
    files.save(SavedRound(round=1, arrays=trained(0), memory={}))

    def read() -> Any:
        saved = files.newest()
        return saved and digest(saved.arrays)

    return Case(lambda: files.save(SavedRound(round=2, arrays=trained(1), memory={})), read)


def flower_metrics(folder: Path) -> Case:
    from fedkl.flower.round_files import RoundFiles

    files = RoundFiles(folder)
    history: Any = {"train_metrics_clientapp": {1: {"loss": 2.5}}}
    files.save_history(history)
    more: Any = {"train_metrics_clientapp": {1: {"loss": 2.5}, 2: {"loss": 1.5}}}
    return Case(lambda: files.save_history(more), lambda: str(files.history(until=9)))


def flower_calls(folder: Path) -> Case:
    from fedkl.flower.calls import Calls

    Calls(folder, None).next()
    return Case(lambda: Calls(folder, None).next(), lambda: Calls(folder, None).run.hex())


def recording(folder: Path) -> Case:
    def write() -> None:
        Recording(received=trained(0), sent=trained(1), about={"round": 1}).write(folder / "round-1")

    return Case(write, lambda: [path.name for path in folder.rglob("about.json")])


def audit_folder(folder: Path) -> Case:
    kept = _Folder(folder / "audit")
    kept.path.mkdir()
    made = audit(finding())
    kept.begin(made.settings)
    return Case(lambda: kept.append(*made.findings), lambda: len(Audit.read(kept.path).findings))


def generator(folder: Path) -> Case:
    info = GeneratorInfo(dataset="noise", classes=2, channels=1, latent=4, width=1)
    path, made = folder / "a.generator", ConditionalGenerator(info)
    save_generator(made, path)
    return Case(
        lambda: save_generator(ConditionalGenerator(info), path),
        lambda: digest(dict(load_generator(str(path)).state_dict())),
    )


def passphrase(folder: Path) -> Case:
    def write() -> None:
        os.environ["XDG_CONFIG_HOME"] = str(folder)
        lockfile.default_passphrase()

    return Case(write, lambda: [path.name for path in folder.rglob("passphrase")])


CASES = {
    case.__name__: case
    for case in (
        key, lock, store, birth, member, memory, cohort, update, checkpoint, model, run_directory,
        privacy_ledger, flower_round, flower_metrics, flower_calls, recording, audit_folder, generator,
        passphrase,
    )
}  # fmt: skip
"""By name."""


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No page is left."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    yield
    path.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing is written: a second mount lies on it, for files that are open would keep it from changing."""
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
    yield
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


FAULTS = {"full": full, "read-only": read_only}


def outcome(case: Case, disk: Path, fault: str) -> dict[str, Any]:
    """What came of a write."""
    before, said = case.read(), ""
    kind: type[BaseException] | None = None
    with FAULTS[fault](disk):
        try:
            case.write()
        except (FedKLError, OSError) as error:
            kind, said = type(error), str(error)
    same = case.read() == before  # now: to open a member or a store takes a lock, which is a write
    parts = [path.name for path in disk.rglob("*.part")]
    case.write()
    changed = case.read() != before
    ours = kind is not None and issubclass(kind, FedKLError)
    return {"ours": ours, "kind": str(kind), "said": said, "same": same, "parts": parts, "changed": changed}


def main() -> None:
    """Prints the outcomes by case."""
    disk, fault = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    lockfile._SCRYPT = {"n": 2, "r": 1, "p": 1}
    found = {}
    for name, case in CASES.items():
        folder = disk / name
        folder.mkdir(mode=0o700)
        found[name] = outcome(case(folder), disk, fault)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
