"""What the closed form recovers from locked gradients: γ, β and the image, per arm, as a Markdown table.

    python benchmarks/closed_form.py --dataset mnist-sample --lock published --layers first --trials 20

Keys and lock layers come from the operating system, so that figures differ a little from run to run.
`--report` adds one line per image.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedkl import data, models, rng
from fedkl.attacking import CANDIDATES, Trial, observe, trials_of
from fedkl.attacks import ClosedForm, Knowledge
from fedkl.attacks.algebraic.closed_form import ClosedFormReconstruction
from fedkl.defenses import Arm, Defense, KeyLock, NoDefense, PrivateNorm
from fedkl.locking import Split
from fedkl.metrics import score

LOCKS = {
    "default": KeyLock(),
    "published": KeyLock(key_distribution="uniform", activation="relu", initialization="published"),
    "sigmoid": KeyLock(key_distribution="uniform", activation="sigmoid", initialization="published"),
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="mnist-sample")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--initialization", choices=("default", "uniform"), default="default")
    parser.add_argument("--layers", choices=("first", "all"), default="first")
    parser.add_argument("--lock", choices=sorted(LOCKS), default="published")
    parser.add_argument("--share-statistics", action="store_true", help="the lock sends norm statistics")
    parser.add_argument("--lock-bound", type=float, help="draw the lock layers anew, from U(−bound, bound)")
    parser.add_argument("--arms", nargs="+", choices=("no-norm", "private-norm", "lock"), default=["lock"])
    parser.add_argument("--chroma", type=float, default=ClosedForm().chroma)
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


def affine_errors(found: ClosedFormReconstruction, victim: Split) -> tuple[float, float]:
    """The largest error of γ, relative to the largest γ of its norm, and of β; NaN where there is no norm."""
    true = {name: p.detach() for name, p in victim.bake().named_parameters()}

    def worst(values: Any, *, relative: bool) -> float:
        return max(
            (
                float((value - true[name]).abs().max() / (true[name].abs().max() if relative else 1.0))
                for name, value in values.items()
            ),
            default=math.nan,
        )

    return worst(found.gammas, relative=True), worst(found.betas, relative=False)


def with_bound(victim: Split, bound: float | None) -> Split:
    """The victim, its lock layers drawn anew from U(−bound, bound)."""
    if bound is not None:
        with torch.no_grad():
            for tensor in victim.private_parameters().values():
                tensor.uniform_(-bound, bound)
    return victim


def one(args: argparse.Namespace, defense: Defense, dataset: data.Dataset, trial: Trial) -> dict[str, float]:
    """Attacks one image."""
    channels, classes = dataset.spec.shape[0], dataset.spec.classes
    model: nn.Module = models.build_model(
        "lenet", channels=channels, classes=classes, seed=trial.index, initialization=args.initialization
    )
    victim = with_bound(defense.prepare(model), args.lock_bound)
    arm = Arm(name="seen", description="", defense=defense, knowledge=Knowledge(labels=False))
    observation = observe(victim, arm=arm, model=model, trial=trial, classes=classes)
    start = time.perf_counter()
    found = ClosedForm(chroma=args.chroma).reconstruct(
        observation, generator=rng.generator(0, "attack", trial.index)
    )
    seconds = time.perf_counter() - start
    assert isinstance(found, ClosedFormReconstruction)
    return figures(found, victim, trial, dataset.test_images[:CANDIDATES]) | {"s": seconds}


def figures(
    found: ClosedFormReconstruction, victim: Split, trial: Trial, candidates: Tensor
) -> dict[str, float]:
    """What is measured of one reconstruction."""
    (result,) = score(
        found.images,
        trial.images,
        candidates=candidates,
        candidate_index=trial.places,
        labels_true=trial.labels,
        labels_found=found.labels,
        scaling=found.scaling,
    )
    gamma, beta = affine_errors(found, victim)
    lowest = found.layers[-1] if found.layers else None
    names = ("correlation", "ssim", "psnr", "psnr_affine")
    values = {name: math.nan if (v := getattr(result, name)) is None else v for name in names}
    return values | {
        "γ error": gamma,
        "β error": beta,
        "identified": float(result.identified),
        "label": float(bool(result.label_correct)),
        "live": math.nan if lowest is None or lowest.live is None else lowest.live,
        "saturated": math.nan if lowest is None or lowest.saturated is None else lowest.saturated,
    }


def row(name: str, results: list[dict[str, float]]) -> str:
    """One line of the table: medians (smallest … largest), rates, and the mean time."""

    def spread(key: str, digits: str) -> str:
        values = sorted(v for r in results if not math.isnan(v := r[key]))
        if not values:
            return "–"
        return f"{statistics.median(values):{digits}} ({values[0]:{digits}} … {values[-1]:{digits}})"

    cells = [spread("γ error", ".1e"), spread("β error", ".1e"), spread("correlation", ".3f")]
    cells += [spread("ssim", ".2f"), spread("psnr", ".1f"), spread("psnr_affine", ".1f")]
    cells += [f"{sum(r[key] for r in results):.0f} of {len(results)}" for key in ("identified", "label")]
    cells += [spread("live", ".0f"), spread("saturated", ".2f")]
    cells.append(f"{statistics.mean(r['s'] for r in results):.0f}")
    return "| " + " | ".join([name, *cells]) + " |"


def main() -> None:
    """Runs the arms and prints the table."""
    args = options()
    torch.set_num_threads(1)
    dataset = data.load(args.dataset)
    lock = replace(LOCKS[args.lock], layers=args.layers, share_statistics=args.share_statistics)
    arms = {"no-norm": NoDefense(), "private-norm": PrivateNorm(like=lock), "lock": lock}
    columns = ["arm", "γ error", "β error", "correlation", "SSIM", "PSNR", "PSNR aligned"]
    columns += ["identified", "label", "live", "saturated", "s"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name in args.arms:
        results = []
        for trial in trials_of(dataset, trials=args.trials):
            results.append(one(args, arms[name], dataset, trial))
            if args.report:
                print({key: float(f"{value:.3g}") for key, value in results[-1].items()}, flush=True)
        lines.append(row(name, results))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
