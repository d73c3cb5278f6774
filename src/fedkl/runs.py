"""Run directories: everything a run leaves behind, appended as it happens, so that it can be continued.

config.toml                 the complete experiment
environment.json            versions and machine, in words, and the version of the directory
results.jsonl               one JSON object a line
ledger.jsonl                what a training's rounds spent of each client's privacy, if it gives a guarantee
reconstructions/*.safetensors   images of an attack, one file per (arm, trial)
summary.json                written last: a run without it was interrupted

A folder may come from anybody: what is read is checked, and what is written stays inside.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError

from fedkl import config as configs
from fedkl.errors import ConfigError, gathered
from fedkl.files import read_file, remove_parts, write_atomically
from fedkl.formats import check_version
from fedkl.parsing import parse_json_object, parse_tensors, parse_toml
from fedkl.run_records import checked
from fedkl.types import NamedTensors
from fedkl.validation import problems_of

_VERSION = 1
_FOLDERS = "mixed"  # how images of folders are ordered
_MAX_JSON = 2**28  # bytes of a JSON file, and of
_MAX_TENSORS = 2**32  # a file of tensors
_OURS = (
    "config.toml",
    "environment.json",
    "results.jsonl",
    "ledger.jsonl",
    "summary.json",
    "reconstructions",
    "checkpoints",
    "tensorboard",
    "global.safetensors",
)
"""What a run writes in its folder."""


class RunDirectory:
    """One run's folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(
        cls, path: Path, *, config: configs.TrainConfig | configs.AttackConfig, version: str
    ) -> RunDirectory:
        """Makes the folder, or continues one with the same configuration.

        Raises:
            ConfigError: The folder holds another run or a link that would be written through, or cannot be
                written.
            NewerFormatError: A newer fedkl wrote it.
        """
        run, data = cls(path), configs.dump(config).encode()
        with run.writing():
            run._refuse_links()
            run._check_version()
            present = run._bytes("config.toml")
            begun = any((path / name).exists() for name in ("results.jsonl", "checkpoints", "summary.json"))
            if present is not None and begun and not same_experiment(present, data):
                remedy = "Choose another --out, or remove the folder."
                if same_experiment(present, configs.dump(configs.keeping_statistics(config)).encode()):
                    remedy = (
                        "It began before norm statistics were recalibrated: go on with --resume, or give "
                        "--set training.norm_statistics=kept."
                    )
                raise ConfigError(f"{path}: this folder holds a run with another configuration. {remedy}")
            if begun and config.data.name == "imagefolder":
                run._refuse_other_order()
            if present is None and path.is_dir() and any(path.iterdir()):
                raise ConfigError(f"{path}: the folder is not empty and holds no run. Choose another --out.")
            write_atomically(path / "config.toml", data)
            if not (path / "summary.json").exists():  # a finished run keeps the environment it ran in
                write_atomically(path / "environment.json", _lines(_environment(version)))
            for folder in (path, path / "reconstructions"):
                remove_parts(folder)
            run._drop_half_line()
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Opens an existing run.

        Raises:
            ConfigError: There is no run.
            NewerFormatError: A newer fedkl wrote it.
        """
        if not is_run(path):
            raise ConfigError(
                f"{path}: not a run directory (no config.toml). Give the folder of a fedkl run."
            )
        run = cls(path)
        run._check_version()
        return run

    @property
    def config(self) -> configs.TrainConfig | configs.AttackConfig:
        """The experiment."""
        return configs.load(self.path / "config.toml", complete=True)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and machine.

        Raises:
            ConfigError: The file is missing or damaged.
        """
        return self._object("environment.json") or {}

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary; None if the run was not finished.

        Raises:
            ConfigError: The file is damaged.
        """
        return self._object("summary.json") if (self.path / "summary.json").exists() else None

    def append(self, record: dict[str, Any]) -> None:
        """Appends one record to results.jsonl, on disk when this returns.

        Raises:
            ConfigError: It cannot be written.
        """
        line = json.dumps(record, allow_nan=False) + "\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with self.writing(), os.fdopen(os.open(self.path / "results.jsonl", flags, 0o644), "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def results(self, *, continued: bool = False) -> Iterator[dict[str, Any]]:
        """The records so far; a last line that was cut off is dropped.

        Args:
            continued: Whether the run shall go on with them, which takes more than reading them.

        Raises:
            ConfigError: The file cannot be read, or a line is no record; it is named.
        """
        path = self.path / "results.jsonl"
        *lines, rest = (self._bytes(path.name) or b"").split(b"\n")
        with contextlib.suppress(ValueError):
            lines += [rest] if parse_json_object(rest) else []
        for number, line in enumerate(lines, start=1):
            try:
                yield checked(line, continued=continued)
            except ValueError as error:
                raise ConfigError(
                    f"{path}: line {number} is damaged ({_reason(error)}). Remove it to continue."
                ) from error

    def _drop_half_line(self) -> None:
        """A run that was killed while writing leaves a line without its end."""
        data = self._bytes("results.jsonl")
        if data and not data.endswith(b"\n"):
            write_atomically(self.path / "results.jsonl", data[: data.rfind(b"\n") + 1])

    def restart_from(self, records: Sequence[dict[str, Any]]) -> None:
        """Keeps only these of an interrupted run's records.

        Raises:
            ConfigError: They cannot be written.
        """
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        if not lines and not (self.path / "results.jsonl").exists():
            return  # nothing begun: the folder is in nobody's way
        with self.writing():
            write_atomically(self.path / "results.jsonl", "".join(lines).encode())

    def save_tensors(self, name: str, tensors: NamedTensors) -> None:
        """Writes tensors to ``name.safetensors``, atomically.

        Raises:
            ConfigError: They cannot be written.
        """
        data = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
        with self.writing():
            write_atomically(self.path / f"{name}.safetensors", data)

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Reads what `save_tensors` wrote.

        Raises:
            ConfigError: The file is missing or damaged.
        """
        path = self.path / f"{name}.safetensors"
        try:
            return parse_tensors(read_file(path, limit=_MAX_TENSORS))[0]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path}: missing or damaged ({_reason(error)}). Run the experiment again."
            ) from error

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json: the run is complete.

        Raises:
            ConfigError: It cannot be written.
        """
        with self.writing():
            write_atomically(self.path / "summary.json", _lines(summary))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Says what is kept where the system refuses to write, e.g. because the disk is full."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written ({error.strerror or error}). What was done so far is kept: "
                "make room, then the same command goes on from there."
            ) from error

    def _check_version(self) -> None:
        with contextlib.suppress(ValueError):  # damaged: who needs it says so
            found = parse_json_object(self._bytes("environment.json") or b"{}")
            check_version(found.get("version"), source=self.path, reads=_VERSION)

    def _refuse_other_order(self) -> None:
        """Images of folders came class after class once: clients would get others, and figures be mixed."""
        found = parse_json_object(self._bytes("environment.json") or b"{}")
        if found.get("folders") != _FOLDERS and not (self.path / "summary.json").exists():
            raise ConfigError(
                f"{self.path}: this run began when images of folders came class after class; now they are "
                "mixed. Begin again in another folder, or go on with the fedkl that it began with."
            )

    def _refuse_links(self) -> None:
        """A link would lead what is written, and what is removed, out of the folder."""
        for name in _OURS:
            if (self.path / name).is_symlink():
                raise ConfigError(
                    f"{self.path / name}: a symbolic link; nothing is written through it. Put what it leads "
                    "to in its place, or choose another --out."
                )

    def _bytes(self, name: str) -> bytes | None:
        """A file's content; None if there is none."""
        try:
            return read_file(self.path / name, limit=_MAX_JSON)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self.path / name}: cannot be read ({error.strerror}).") from error

    def _object(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return parse_json_object(read_file(path, limit=_MAX_JSON))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path}: missing or damaged ({_reason(error)}). Remove it and run the experiment again."
            ) from error


def same_experiment(present: bytes, data: bytes) -> bool:
    """Whether two config.toml say the same; one of an older version lacks fields that came later."""
    if present == data:
        return True
    try:
        values = (parse_toml(text.decode()) for text in (present, data))
        one, other = (configs.as_written(each, source="config.toml") for each in values)
        return one == other
    except (ValueError, ConfigError):
        return False


def is_run(path: Path) -> bool:
    """Whether a folder holds a run."""
    try:
        return (path / "config.toml").is_file()
    except OSError:  # a name that no file can have
        return False


def _lines(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(problems_of(error)[:3])
    return str(error.strerror if isinstance(error, OSError) else error)


def _environment(version: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "version": _VERSION,
        "fedkl": version,
        "folders": _FOLDERS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def damaged_summary(directory: RunDirectory, problems: Sequence[str]) -> ConfigError:
    """What to raise where a summary is not what its run leaves."""
    place = f"{directory.path / 'summary.json'}: not the summary of this run."
    return ConfigError(gathered(place, problems, "Remove it and run the experiment again."))
