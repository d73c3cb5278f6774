"""What is kept on disk between calls: per surface its corpus, counts and findings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.fuzzing.contract import Finding


class Store:
    """The folder of one surface.

    corpus/        inputs that reached something new
    findings/KEY/  input and report.txt, one folder for each cause
    counts.json    inputs and seconds so far
    known.json     outcomes and lines reached so far

    Args:
        state: The folder of all surfaces.
        surface: Its name.
    """

    def __init__(self, state: Path, surface: str) -> None:
        self.folder = state / surface
        self.surface = surface
        for name in ("corpus", "findings"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        ignore = state / ".gitignore"  # the folder is in nobody's way, wherever it is
        if not ignore.exists():
            ignore.write_text("*\n")

    @property
    def corpus_folder(self) -> Path:
        """Where the corpus lies, a file for each input."""
        return self.folder / "corpus"

    def corpus(self) -> list[bytes]:
        """The inputs that were kept."""
        return [path.read_bytes() for path in sorted(self.corpus_folder.iterdir())]

    def keep(self, data: bytes) -> None:
        """Keeps an input for later calls."""
        (self.corpus_folder / hashlib.sha256(data).hexdigest()[:20]).write_bytes(data)

    def counts(self) -> dict[str, float]:
        """Inputs so far, the seconds that they took, and the seconds of a core's work in them."""
        return {"inputs": 0, "seconds": 0.0, "work": 0.0, **_read_json(self.folder / "counts.json")}

    def add(self, *, inputs: int, seconds: float, work: float) -> None:
        """Adds what a worker has done."""
        counts = self.counts()
        counts["inputs"] += inputs
        counts["seconds"] += seconds
        counts["work"] += work
        _write_json(self.folder / "counts.json", counts)

    def known(self) -> tuple[set[str], list[tuple[str, int]]]:
        """Outcomes and lines that inputs have reached."""
        values = _read_json(self.folder / "known.json")
        return set(values.get("outcomes", ())), [(file, line) for file, line in values.get("lines", ())]

    def remember(self, outcomes: Iterable[str], lines: Iterable[tuple[str, int]]) -> None:
        """Replaces what is known."""
        _write_json(self.folder / "known.json", {"outcomes": sorted(outcomes), "lines": sorted(lines)})

    def findings(self) -> list[Path]:
        """The folders of the findings."""
        return sorted(path for path in (self.folder / "findings").iterdir() if (path / "input").is_file())

    def has(self, finding: Finding) -> bool:
        """Whether its cause is known."""
        return (self.folder / "findings" / finding.key / "input").is_file()

    def record(self, data: bytes, finding: Finding) -> Path:
        """Keeps a finding; of one cause, the smallest input."""
        folder = self.folder / "findings" / finding.key
        path = folder / "input"
        if path.is_file() and path.stat().st_size <= len(data):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        replay = f"python -m tests.fuzzing --replay {path}"
        report = f"{finding.what}\n\ncause: {finding.cause}\nreplay: {replay}\n\n{finding.details}"
        (folder / "report.txt").write_text(report, encoding="utf-8", errors="backslashreplace")
        path.write_bytes(data)
        return folder


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    return {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(values), encoding="utf-8")
    part.replace(path)
