"""Every format that fedkl writes and reads: its vector, how it is read, and how its version is raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

import fedkl
from fedkl import PublicUpdate, lockfile, modelfile, study
from fedkl.attacking.results import attack_summary
from fedkl.attacks.generators.files import load_generator
from fedkl.auditing.results import Audit
from fedkl.custody import Ledger
from fedkl.custody.backup import read_backup
from fedkl.custody.journal import Journal
from fedkl.federated import Checkpoints
from fedkl.masking import MemberFile
from fedkl.masking.exchange import read_card, read_cohort
from fedkl.masking.update_file import UpdateFile
from fedkl.parsing import parse_tensors
from fedkl.privacy import LedgerFile
from fedkl.recordingfile import Recording
from fedkl.runs import RunDirectory
from tests.vectors.make import CALL, KEY, PASSPHRASE, net, small_federation
from tests.vectors.make_malformed import container, sealed

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Attributes:
        vector: A file or folder of it, below this folder.
        file: The file in it that carries the version; empty: the vector itself.
        read: Reads a copy of the vector, as the package does.
        raise_version: Gives a file the next version.
    """

    vector: str
    read: Callable[[Path], Any]
    raise_version: Callable[[Path], None]
    file: str = ""


def next_container(path: Path) -> None:
    """A key, lock, checkpoint or member's file: the header is changed."""
    fields, body = container(path.read_bytes())
    path.write_bytes(sealed(fields | {"version": fields["version"] + 1}, body))


def next_contents(path: Path) -> None:
    """What is in a member's secret file, in a whole container."""
    meta, tensors = lockfile.read(path, kind="member", passphrase=PASSPHRASE)
    meta["version"] += 1
    lockfile.write(path, kind="member", meta=meta, tensors=tensors, passphrase=PASSPHRASE)


def next_json(path: Path) -> None:
    """JSON, or the first line of JSON lines; the first version of some does not say so."""
    first, *others = path.read_text().split("\n{")
    values = json.loads(first)
    changed = json.dumps(values | {"version": values.get("version", 1) + 1}, indent=1)
    path.write_text("\n{".join([changed, *others]))


def next_line(path: Path) -> None:
    """JSON lines."""
    first, *others = path.read_text().splitlines()
    values = json.loads(first)
    path.write_text("\n".join([json.dumps(values | {"version": values["version"] + 1}), *others]) + "\n")


def next_tensors(path: Path) -> None:
    """A safetensors file whose metadata name the format."""
    tensors, beside = parse_tensors(path.read_bytes())
    name, _, version = beside["format"].rpartition("-")
    path.write_bytes(safetensors.torch.save(tensors, beside | {"format": f"{name}-{int(version) + 1}"}))


def next_recording(path: Path) -> None:
    """``about.json``."""
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"format": "fedkl-recording-2"}))


def _member(path: Path) -> Any:
    with MemberFile.open(path, passphrase=PASSPHRASE) as file:
        return file.memory()


def _checkpoint(path: Path) -> Any:
    return Checkpoints(path, passphrase=PASSPHRASE).restore(small_federation())


def _update(path: Path) -> Any:
    return PublicUpdate.from_bytes(path.read_bytes(), schema=fedkl.lock(net()).schema("weights"))


def _round(path: Path) -> Any:
    from fedkl.flower.round_files import RoundFiles

    return RoundFiles(path).newest()


def _history(path: Path) -> Any:
    from fedkl.flower.round_files import RoundFiles

    return RoundFiles(path).history(until=9)


def _calls(path: Path) -> Any:
    from fedkl.flower.calls import Calls

    return Calls(path, None).count


FORMATS = {
    "key": Format(
        vector="generation-1/normal-encrypted.key",
        read=lambda path: fedkl.load_key(path, passphrase=PASSPHRASE),
        raise_version=next_container,
    ),
    "lock": Format(
        vector="generation-1/first.lock",
        read=lambda path: fedkl.load_lock(path, net(), passphrase=PASSPHRASE),
        raise_version=next_container,
    ),
    "checkpoint": Format(
        vector="generation-1/checkpoint",
        file="private-000002-0.fedkl",
        read=_checkpoint,
        raise_version=next_container,
    ),
    "checkpoint manifest": Format(
        vector="generation-1/checkpoint", file="round-000002.json", read=_checkpoint, raise_version=next_json
    ),
    "member": Format(
        vector="generation-4",
        file="ward-a.secret",
        read=lambda p: _member(p / "ward-a.secret"),
        raise_version=next_container,
    ),
    "member's contents": Format(
        vector="generation-4",
        file="ward-a.secret",
        read=lambda p: _member(p / "ward-a.secret"),
        raise_version=next_contents,
    ),
    "backup": Format(
        vector="generation-6/ward-3.backup",
        read=lambda path: read_backup(path, passphrase=PASSPHRASE),
        raise_version=next_container,
    ),
    "journal": Format(
        vector="generation-6/store/ward-3",
        file="journal.jsonl",
        read=lambda path: Journal(path).read(),
        raise_version=next_line,
    ),
    "memory": Format(
        vector="generation-4",
        file="ward-a.memory",
        read=lambda p: _member(p / "ward-a.secret"),
        raise_version=next_container,
    ),
    "update": Format(
        vector="generation-5/ward-a.study.update",
        read=lambda path: UpdateFile(path, key=KEY).read(CALL),
        raise_version=next_container,
    ),
    "card": Format(vector="generation-4/ward-a.member", read=read_card, raise_version=next_json),
    "cohort": Format(vector="generation-4/study.cohort", read=read_cohort, raise_version=next_json),
    "model": Format(
        vector="generation-3/model.safetensors", read=modelfile.read_model, raise_version=next_tensors
    ),
    "public update": Format(vector="generation-1/weights.update", read=_update, raise_version=next_tensors),
    "recording": Format(
        vector="generation-5/recording", file="about.json", read=Recording.read, raise_version=next_recording
    ),
    "privacy ledger": Format(
        vector="generation-5/ledger.jsonl",
        read=lambda path: LedgerFile(path, delta=1e-5).entries(rounds=1),
        raise_version=next_line,
    ),
    "store's ledger": Format(
        vector="generation-5/store/ward-3", file="ledger.json", read=Ledger.read, raise_version=next_json
    ),
    "run directory": Format(
        vector="generation-5/run", file="environment.json", read=RunDirectory.open, raise_version=next_json
    ),
    "attack's summary": Format(
        vector="generation-1/attack",
        file="summary.json",
        read=lambda path: attack_summary(RunDirectory.open(path)),
        raise_version=lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3})),
    ),
    "audit": Format(vector="generation-5/audit", file="audit.json", read=Audit.read, raise_version=next_json),
    "table": Format(
        vector="generation-5/table",
        file="reproduce.json",
        read=lambda path: study.claim(path, table="table6", places=[]),
        raise_version=next_json,
    ),
    "generator": Format(
        vector="generation-5/noise.generator",
        read=lambda path: load_generator(str(path)),
        raise_version=next_tensors,
    ),
    "Flower round": Format(
        vector="generation-1/rounds", file="round-000002.fedkl", read=_round, raise_version=next_container
    ),
    "Flower metrics": Format(
        vector="generation-5/rounds", file="history.json", read=_history, raise_version=next_json
    ),
    "Flower calls": Format(
        vector="generation-5/calls", file="calls.json", read=_calls, raise_version=next_json
    ),
}
"""By the name that docs/file-formats.md has for it."""

WRITERS = {
    "attacking/records.py": "part of a run directory: lpips.json",
    "attacks/generators/files.py": "generator",
    "auditing/run.py": "audit",
    "cli/audit.py": "output: SARIF, JUnit, Markdown, each with a version of its own",
    "cli/recordings.py": "output: one update as a plain safetensors file",
    "custody/backup.py": "backup",
    "custody/journal.py": "journal",
    "custody/ledger.py": "store's ledger",
    "federated/checkpoint.py": "checkpoint manifest",
    "federated/private_files.py": "checkpoint",
    "files.py": "",
    "flower/calls.py": "Flower calls",
    "flower/round_files.py": "Flower round",
    "generator_training.py": "output: a picture",
    "keyfile.py": "key",
    "lockfile.py": "",
    "locking/keylock.py": "lock",
    "masking/contents.py": "member",
    "masking/exchange.py": "cohort",
    "masking/memory_file.py": "memory",
    "masking/update_file.py": "update",
    "modelfile.py": "model",
    "passphrases.py": "output: a passphrase as text",
    "privacy/ledgerfile.py": "privacy ledger",
    "recordingfile.py": "recording",
    "report/__init__.py": "output: a report",
    "reproduce/defenses.py": "output: a figure",
    "reproduce/frontier.py": "output: a figure",
    "reproduce/gallery.py": "output: pictures",
    "runs.py": "run directory",
    "study.py": "table",
}
"""By module that writes files: the format, or why it needs no version."""
