"""Five hospitals in five folders: the commands from nothing to joined, then one masked round.

    python benchmarks/five_members.py

Prints one JSON line. Cards and the cohort's file are carried between the folders; the cohort's
fingerprint is what the five would compare on the phone. The round is Flower's example in one process.
docs/results/2026-11-masks.md has the figures.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from flower_deployment import app_defaults
from safetensors.torch import load_file

from fedkl.masking.exchange import read_cohort

MEMBERS = 5
NAMES = [f"client-{number}" for number in range(MEMBERS)]  # as Flower's nodes are numbered in one process


def main() -> None:
    """Runs all of it in a temporary folder."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    os.environ.setdefault("FEDKL_PASSPHRASE", "of this trial")
    with tempfile.TemporaryDirectory(prefix="fedkl-five-") as folder:
        start = perf_counter()
        commands = list(joined(Path(folder)))
        setup = perf_counter() - start
        models = delivered(Path(folder))
        found = {
            "commands": len(commands),
            "seconds_of_commands": round(setup, 1),
            "seconds": round(perf_counter() - start, 1),
            "delivered": len(models),
            "all_the_same": all(
                model.keys() == models[0].keys()
                and all(torch.equal(tensor, models[0][name]) for name, tensor in model.items())
                for model in models
            ),
        }
    print(json.dumps(found))


def joined(folder: Path) -> Iterator[list[str]]:
    """Every command that the five type, as it is run."""
    for name in NAMES:
        (folder / name).mkdir()
        yield run(["member", "new", name], folder / name)
        if name != NAMES[0]:
            shutil.copy(folder / name / f"{name}.member", folder / NAMES[0])  # carried to the founder
    cards = [f"{name}.member" for name in NAMES]
    yield run(["cohort", "new", "study.cohort", *cards], folder / NAMES[0])
    spoken = read_cohort(folder / NAMES[0] / "study.cohort").roster.fingerprint
    for name in NAMES:
        if name != NAMES[0]:
            shutil.copy(folder / NAMES[0] / "study.cohort", folder / name)  # and back
        yield run(["cohort", "join", "study.cohort", "--fingerprint", spoken], folder / name)


def run(arguments: list[str], folder: Path) -> list[str]:
    """One command in a hospital's folder."""
    done = subprocess.run(  # noqa: S603 -- this file's own words
        [sys.executable, "-m", "fedkl", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"fedkl {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return arguments


def delivered(folder: Path) -> list[dict[str, torch.Tensor]]:
    """One round of the example with the five secret files; the models that it leaves beside them."""
    from fedkl_flower_example import masked_client_app, server_app

    from fedkl.flower import run_in_process

    torch.set_num_threads(1)
    nodes = folder / "nodes"
    nodes.mkdir()
    for name in NAMES:
        shutil.move(folder / name / f"{name}.secret", nodes)
    config = app_defaults() | {"rounds": 1, "masked": True, "min-replies": MEMBERS}
    run_in_process(
        server_app.app,
        masked_client_app.app,
        clients=MEMBERS,
        run_config=config,
        node_config={"fedkl-member": str(nodes), "fedkl-store": str(nodes), "fedkl-passphrase-file": ""},
    )
    return [load_file(path) for path in sorted(nodes.rglob("*.study.safetensors"))]


if __name__ == "__main__":
    main()
