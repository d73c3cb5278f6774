"""Whether a change of the code changed a figure: thirteen small cells, one for each attack.

    python benchmarks/same_figures.py --out before.json        # on one commit
    python benchmarks/same_figures.py --out after.json --compare before.json

The operating system's random numbers are replaced by a fixed stream here, so that keys and lock layers
repeat too. The settings are far from those at which an attack is at its best: nothing here says how much an
attack finds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

CELLS: dict[str, str] = {
    "dlg": "--attack dlg --set attack.evaluations=40 --trials 2 "
    "--arms no-norm,public-norm,lock,lock-known-both",
    "idlg": "--attack idlg --set attack.evaluations=40 --arms no-norm,lock --trials 2 --set norm_mode=eval",
    "ig": "--attack ig --arms no-norm,lock-regressed-affine,private-head --trials 2 --batch-size 2 "
    "--set local.steps=2 --set attack.iterations=30",
    "adaptive-matching": "--attack adaptive-matching --arms no-norm,lock --trials 2 "
    "--set attack.iterations=30",
    "grnn": "--attack grnn --set labels_known=false --arms no-norm,lock --trials 2 "
    "--set attack.iterations=10",
    "ggl": "--attack ggl --set attack.generator=mnist --arms no-norm,lock --trials 2 "
    "--set attack.generations=4",
    "closed-form": "--attack closed-form --arms no-norm,public-norm,lock --trials 2",
    "wiener": "--attack wiener --arms public-norm,lock --trials 2 --set networks=one --auxiliary 400 "
    "--set lock.granularity=element --set lock.key_length=64 --set attack.components=100 "
    "--set attack.draws=4 --set attack.starts=3",
    "mean-map": "--attack mean-map --arms private-stem --trials 2 --set networks=one --auxiliary 400 "
    "--set attack.components=50 --set attack.steps=20",
    "learned": "--attack learned --arms no-norm,lock,lock-shared-statistics --trials 6 --set networks=one "
    "--auxiliary 400 --set updates_per_client=2 --set attack.simulations=200 --set local.steps=3",
    "feature-inversion": "--attack feature-inversion --arms no-norm,lock --trials 2 --set networks=one "
    "--auxiliary 200 --set attack.simulations=100 --set attack.components=100 --set attack.iterations=20 "
    "--model resnet20",
    "gauss-newton": "--attack gauss-newton --arms no-norm,lock --trials 2 --set networks=one --auxiliary 400 "
    "--set attack.components=32 --set attack.iterations=8 --set attack.draws=4",
    "prior-only": "--attack prior-only --arms public-norm,private-norm,lock --trials 4 --set networks=one "
    "--auxiliary 400 --batch-size 4 --set cohort=2",
}


def fixed_random_numbers(seed: str) -> None:
    """Replaces `os.urandom` by a stream that depends on the seed only."""
    drawn = 0

    def urandom(count: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(f"{seed} {drawn}".encode()).digest(count)

    os.urandom = urandom


def figures(name: str, flags: str) -> dict[str, Any]:
    """What a cell gives: every number of every trial, and a digest of the pictures."""
    from fedkl.attacking.reconstructions import load_reconstruction
    from fedkl.cli import app
    from fedkl.runs import RunDirectory

    fixed_random_numbers(name)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = f"attack --out {out} --data mnist-sample --set workers=1 --seed 0 {flags}".split()
        app(words, standalone_mode=False)
        run = RunDirectory.open(out)
        found = {}
        for record in run.results():
            if record["event"] == "trial":
                images, _ = load_reconstruction(run, record["arm"], trial=record["trial"])
                digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:16]
                kept = {key: record[key] for key in ("loss", "evaluations", "scaling", "scores")}
                found[f"{record['arm']} {record['trial']}"] = kept | {"pictures": digest}
        return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Prints how far each cell agrees.

    Returns:
        How many places differ.
    """
    differing = 0
    for cell in before:
        if cell not in after:
            print(f"{cell}: not run")
            continue
        places = {*before[cell], *after[cell]}
        other = sorted(place for place in places if before[cell].get(place) != after[cell].get(place))
        differing += len(other)
        print(
            f"{cell}: {len(places) - len(other)} of {len(places)} equal to the last digit", *other, sep="\n  "
        )
    return differing


def main() -> int:
    """Runs the cells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--cell", action="append", choices=CELLS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in options.cell or CELLS:
        found[name] = figures(name, CELLS[name])
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.compare is None:
        return 0
    return int(compare(json.loads(options.compare.read_text()), found) > 0)


if __name__ == "__main__":
    sys.exit(main())
