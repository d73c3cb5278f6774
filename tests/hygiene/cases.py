"""Attempts in a process without checks of types: ``python -m tests.hygiene.cases``.

Reads a list of (scenario, stage or null) as JSON from stdin, and writes what was found of each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from fedkl import lockfile
from tests.hygiene.__main__ import attempt
from tests.hygiene.scenarios import SCENARIOS, leak

_IMPORTED = ("fedkl.cli", "fedkl.experiments", "fedkl.report", "fedkl.auditing", "torch._dynamo")
"""What attempts would import, each by itself; the last is the first optimizer's."""


def main() -> None:
    """Does them one after another."""
    for name in _IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    lockfile._SCRYPT = {"n": 2, "r": 1, "p": 1}
    SCENARIOS["leak"] = leak
    results = []
    for name, at in json.load(sys.stdin):
        os.environ["LEAK"] = at or ""
        with tempfile.TemporaryDirectory() as root:
            found, stopped, _ = attempt(name, at=None if name == "leak" else at, root=Path(root))
            shown = [path.read_text(errors="replace") for path in Path(root).glob("*/stderr")]
        results.append(
            {"stopped": stopped, "secrets": found.secrets, "leaks": found.leaks, "stderr": shown[0]}
        )
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
