"""What attackers make of masked updates: of single uploads in every mode, and of sums in the open.

    python benchmarks/masked_attacks.py uploads --out runs/uploads
    python benchmarks/masked_attacks.py uploads --out runs/uploads --attacks closed-form --images 100
    python benchmarks/masked_attacks.py sums --out runs/sums
    python benchmarks/masked_attacks.py sums --out runs/trained --weights RUN     # of `fedkl train`

`uploads`: one gradient of one image by LeNet on MNIST, undefended (the control) and masked. `sums`: what a
server reads with pairwise masks, or with any secure aggregation: the mean gradient of n clients with B images
each. Floor: a guess from the labels alone. One JSON object a line; finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from fedkl import experiment_flags
from fedkl.attacking import run
from fedkl.attacking.verdict import judge
from fedkl.config import AttackConfig
from fedkl.errors import AttackError

MODES = ("blind", "pairwise", "both")
SUMS = ((1, 1), (3, 1), (4, 1), (8, 1), (16, 1), (8, 4), (16, 4), (16, 8), (16, 16))
"""Clients and the images of each."""

ATTACKS: dict[str, dict[str, Any]] = {
    "linear-rows": {"type": "linear-rows"},
    "learned": {"type": "learned"},
    "dlg": {"type": "dlg", "evaluations": 250},
    "idlg": {"type": "idlg", "evaluations": 250},
    "matching": {"type": "ig", "iterations": 300, "weighting": "sqrt"},
    "closed-form": {"type": "closed-form"},
    "gauss-newton": {"type": "gauss-newton", "components": 200, "iterations": 40},
    "grnn": {"type": "grnn", "iterations": 300},
    "ggl": {"type": "ggl", "generator": "mnist", "generations": 40},
}
OF_UPLOADS = ("linear-rows", "learned", "matching", "closed-form")
OF_SUMS = ("linear-rows", "learned", "matching")


def attacked(
    given: argparse.Namespace, name: str, place: str, *, control: dict[str, Any] | None, **about: Any
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """One run: its line, and the arm that hides nothing, the control of the other modes."""
    fields = {
        "seed": given.seed,
        "data.name": "mnist",
        "model.name": "lenet",
        "model.standardize": True,
        "model.initialization": "uniform",
        "model.weights": given.weights,
        "networks": "one",
        "auxiliary": given.auxiliary,
        "attack": ATTACKS[name],
        "workers": 1,
    }
    config = experiment_flags.from_flags("attack", file=None, fields=fields | about, settings=())
    assert isinstance(config, AttackConfig)
    try:
        found = run.attack(config, out=given.out / place / name).summary
    except AttackError as error:
        return {"attack": name, "refused": str(error)}, None
    assert found is not None
    arms = {arm["name"]: arm for arm in found["arms"]}
    control = control or arms.get("no-norm")
    line: dict[str, Any] = {"attack": name, "floor": shares(found["floor"])}
    for each, arm in arms.items():
        verdict = judge(arm, floor=found["floor"], control=control, open=arm is control)
        line[each] = shares(arm) | {"verdict": verdict.text}
    return line | {"seconds": round(found["seconds"])}, control


def shares(arm: dict[str, Any]) -> dict[str, Any]:
    """Identified and recovered: share, its 95 % interval, images."""
    parts = (arm["identified"], arm["success"])
    return {
        name: [round(part[key], 3) for key in ("rate", "low", "high")] + [part["n"]]
        for name, part in zip(("identified", "recovered"), parts, strict=True)
    }


def uploads(given: argparse.Namespace) -> None:
    """Single uploads; their control looks the same in every mode, and is attacked once."""
    for name in given.attacks or OF_UPLOADS:
        control = None
        for mode in MODES:
            about = {"defense": {"type": "masked", "mode": mode}, "trials": given.images}
            about["arms"] = ("masked",) if control else ("no-norm", "masked")
            line, control = attacked(given, name, mode, control=control, **about)
            print(json.dumps({"mode": mode, **line}), flush=True)


def sums(given: argparse.Namespace) -> None:
    """Sums in the open; their control is the update of one client with one image."""
    for name in given.attacks or OF_SUMS:
        control = None
        for clients, images in SUMS:
            together = clients * images
            about = {
                "defense": {"type": "none"},
                "trials": math.ceil(given.images / together),
                "batch_size": together,
                "cohort": clients,
            }
            line, first = attacked(given, name, f"{clients}x{images}", control=control, **about)
            control = control or first
            print(json.dumps({"clients": clients, "images": images, **line}), flush=True)


def main() -> None:
    """Prints one JSON object a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["uploads", "sums"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS))
    parser.add_argument("--images", type=int, default=100, help="counted in a cell, about")
    parser.add_argument("--auxiliary", type=int, default=1000, help="labeled images of the server's own")
    parser.add_argument("--weights", help="a run directory of `fedkl train`; untrained without it")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    {"uploads": uploads, "sums": sums}[given.what](given)


if __name__ == "__main__":
    main()
