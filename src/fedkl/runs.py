"""Run directories: everything a run leaves behind, appended as it happens, so that it can be continued.

config.toml                 the complete experiment
environment.json            versions and machine, in words
results.jsonl               one JSON object a line
reconstructions/*.safetensors   images of an attack, one file per (arm, trial)
summary.json                written last: a run without it was interrupted
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fedkl import config as configs
from fedkl.errors import ConfigError
from fedkl.files import remove_parts, write_atomically
from fedkl.types import NamedTensors


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
            ConfigError: The folder holds another run, or cannot be written.
        """
        text = configs.dump(config)
        present = path / "config.toml"
        begun = any((path / name).exists() for name in ("results.jsonl", "checkpoints", "summary.json"))
        if present.exists() and begun and present.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{path}: this folder holds a run with another configuration. Choose another --out, or "
                "remove the folder."
            )
        if not present.exists() and path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"{path}: the folder is not empty and holds no run. Choose another --out.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_text(present, text)
            if not (path / "summary.json").exists():  # a finished run keeps the environment it ran in
                write_text(path / "environment.json", json.dumps(_environment(version), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from error
        run = cls(path)
        remove_parts(path)
        run._drop_half_line()
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Opens an existing run.

        Raises:
            ConfigError: There is no run.
        """
        if not (path / "config.toml").is_file():
            raise ConfigError(
                f"{path}: not a run directory (no config.toml). Give the folder of a fedkl run."
            )
        return cls(path)

    @property
    def config(self) -> configs.TrainConfig | configs.AttackConfig:
        """The experiment."""
        return configs.load(self.path / "config.toml")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and machine."""
        values: dict[str, Any] = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        return values

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary; None if the run was not finished."""
        path = self.path / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def append(self, record: dict[str, Any]) -> None:
        """Appends one record to results.jsonl, on disk when this returns."""
        line = json.dumps(record, allow_nan=False)
        with (self.path / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def results(self) -> Iterator[dict[str, Any]]:
        """The records so far; a last line that was cut off is dropped."""
        path = self.path / "results.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if number < len(lines) or line.endswith("\n"):
                    raise ConfigError(f"{path}: line {number} is damaged. Remove it to continue.") from error

    def _drop_half_line(self) -> None:
        """A run that was killed while writing leaves a line without its end."""
        path = self.path / "results.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):
            write_text(path, text[: text.rfind("\n") + 1])

    def restart_from(self, records: Sequence[dict[str, Any]]) -> None:
        """Keeps only these of an interrupted run's records."""
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        write_text(self.path / "results.jsonl", "".join(lines))

    def save_tensors(self, name: str, tensors: NamedTensors) -> None:
        """Writes tensors to ``name.safetensors``, atomically."""
        data = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
        write_atomically(self.path / f"{name}.safetensors", data)

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Reads what `save_tensors` wrote.

        Raises:
            ConfigError: The file is missing or damaged.
        """
        path = self.path / f"{name}.safetensors"
        try:
            return safetensors.torch.load(path.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{path}: missing or damaged. Run the experiment again.") from error

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json: the run is complete."""
        write_text(self.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_atomically(path, text.encode())


def _environment(version: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "fedkl": version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
