"""What auxiliary images recover from behind locks per element and a private stem, as a Markdown table.

    python benchmarks/element_locks.py --dataset mnist --locks positive signed signs --trials 20
    python benchmarks/element_locks.py --dataset mnist --locks stem --updates 16 --trials 32

One LeNet with default initialization, a key per client; the server's images are training images, the
attacked ones test images. `--report` adds one line per image.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import data, models, rng
from fedkl.attacking import CANDIDATES, SimulatedClients, Trial, observe, trials_of
from fedkl.attacks import (
    Attack,
    Auxiliary,
    Knowledge,
    MeanMap,
    Observation,
    PriorOnly,
    Procedure,
    Reconstruction,
    Wiener,
)
from fedkl.defenses import Arm, PrivateLayers
from fedkl.keys import Key
from fedkl.locking import Split, withhold, withhold_statistics
from fedkl.metrics import score

DRAWS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "positive": lambda u, v: (F.softplus(0.54 + u), F.softplus(v)),
    "signs": lambda u, v: (u.sign(), 0 * v),
    "signed": lambda u, v: (u.tanh(), v.tanh()),
    "wide": lambda u, v: (u, v),
    "noise-12": lambda u, v: (torch.ones_like(u), 10 ** (12 / 20) * v),
    "noise-24": lambda u, v: (torch.ones_like(u), 10 ** (24 / 20) * v),
}
"""γ and β of an element from two standard normal numbers. To who sees one update, noise 12 or 24 dB above the
standardized signal is a shift of its own for every element."""


class Affine(nn.Module):
    """X · weight + bias, each of the shape of one value."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """As it says."""
        return x * self.weight + self.bias


@dataclass(frozen=True, kw_only=True)
class ElementLock(PrivateLayers):
    """A private scale and shift per element behind a norm behind LeNet's first convolution.

    Attributes:
        draw: Which of `DRAWS`.
        head: Whether the classifier is private too.
    """

    draw: str = "positive"
    head: bool = False

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Locks a copy of the model, with γ and β of PyTorch's own generator."""
        affine = Affine(*DRAWS[self.draw](torch.randn(12, 16, 16), torch.randn(12, 16, 16)))
        own = behind_first_norm(model, affine)
        split = Split(own)
        withhold(affine, ("weight", "bias"))
        withhold_statistics(own)
        if self.head:
            withhold(own.get_submodule("fc"), ("weight", "bias"))
        return split


def behind_first_norm(model: nn.Module, affine: Affine) -> nn.Module:
    """A copy of a LeNet whose first convolution is followed by a norm, and that by the scale and shift."""
    own = copy.deepcopy(model)
    layer = own.get_submodule("conv1")
    norm = nn.BatchNorm2d(12, affine=False)
    layer.add_module("norm", norm)
    setattr(norm, "affine", affine)  # noqa: B010 - a module in the place of its flag
    layer.register_forward_hook(_through("norm"))
    norm.register_forward_hook(_through("affine"))
    return own


def _through(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        passed: Tensor = module.get_submodule(name)(output)
        return passed

    return hook


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="mnist-sample")
    parser.add_argument("--locks", nargs="+", choices=(*DRAWS, "stem"), default=["positive"])
    parser.add_argument("--private-head", action="store_true", help="the classifier is private too")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1, help="consecutive images that one client sends")
    parser.add_argument("--auxiliary", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the network, the secrets and the sample")
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


def observed(
    args: argparse.Namespace, defense: PrivateLayers, dataset: data.Dataset, trials: list[Trial]
) -> list[Observation]:
    """What the server has of all clients."""
    channels, classes = dataset.spec.shape[0], dataset.spec.classes
    model: nn.Module = models.build_model(
        "lenet", channels=channels, classes=classes, seed=args.seed, initialization="default"
    )
    arm = Arm(name="seen", description="", defense=defense, knowledge=Knowledge(auxiliary=args.auxiliary))
    victims = [defense.prepare(model) for _ in range(0, len(trials), args.updates)]
    clients = SimulatedClients.of(arm, victims[0], model, local=Procedure())
    index = torch.randperm(len(dataset.train_images), generator=rng.generator(args.seed, "auxiliary"))
    own = Auxiliary(
        images=dataset.train_images[index[: args.auxiliary]],
        labels=dataset.train_labels[index[: args.auxiliary]],
        simulate=clients,
        draw=clients.draw,
    )
    seen = []
    for place, trial in enumerate(trials):
        client = place // args.updates
        one = observe(victims[client], arm=arm, model=model, trial=trial, classes=classes, auxiliary=own)
        seen.append(replace(one, client=client))
    return seen


def attacked(
    args: argparse.Namespace, lock: str, dataset: data.Dataset, trials: list[Trial]
) -> list[dict[str, float]]:
    """Attacks all clients behind one lock."""
    defense = PrivateLayers(layers="stem")
    attack: Attack = MeanMap()
    if lock != "stem":
        defense, attack = ElementLock(draw=lock, head=args.private_head), Wiener()
    seen = observed(args, defense, dataset, trials)
    start = time.perf_counter()
    found = _attacked(attack, seen, args, trials)
    seconds = (time.perf_counter() - start) / len(seen)
    floors = {
        f"floor, {guess}": _attacked(PriorOnly(guess=guess), seen, args, trials)
        for guess in ("class-mean", "mean")
    }
    candidates, results = max(CANDIDATES, args.trials), []
    for place, trial in enumerate(trials):
        own = figures(found[place], dataset, trial, candidates) | {"s": seconds}
        for name, made in floors.items():
            own[name] = figures(made[place], dataset, trial, candidates)["correlation"]
        results.append(own)
        if args.report:
            print(lock, trial.index, {key: float(f"{value:.3g}") for key, value in own.items()}, flush=True)
    return results


def _attacked(
    attack: Attack, seen: list[Observation], args: argparse.Namespace, trials: list[Trial]
) -> list[Reconstruction]:
    generators = [rng.generator(args.seed, "attack", trial.index) for trial in trials]
    return attack.reconstruct_many(seen, generators=generators)


def figures(found: Reconstruction, dataset: data.Dataset, trial: Trial, candidates: int) -> dict[str, float]:
    """What is measured of one reconstruction."""
    (result,) = score(
        found.images,
        trial.images,
        candidates=dataset.test_images[:candidates],
        candidate_index=trial.places,
        labels_true=trial.labels,
        labels_found=found.labels,
        scaling=found.scaling,
    )
    names = ("correlation", "ssim", "psnr")
    values = {name: math.nan if (v := getattr(result, name)) is None else v for name in names}
    return values | {"identified": float(result.identified), "loss": found.loss}


def row(name: str, results: list[dict[str, float]]) -> str:
    """One line of the table: medians (smallest … largest), the rate, and the mean time."""

    def spread(key: str, digits: str) -> str:
        values = sorted(v for r in results if not math.isnan(v := r[key]))
        if not values:
            return "–"
        return f"{statistics.median(values):{digits}} ({values[0]:{digits}} … {values[-1]:{digits}})"

    cells = [str(len(results)), spread("correlation", ".3f"), spread("ssim", ".2f"), spread("psnr", ".1f")]
    cells.append(f"{sum(r['identified'] for r in results):.0f} of {len(results)}")
    cells += [spread("floor, class-mean", ".2f"), spread("floor, mean", ".2f"), spread("loss", ".3f")]
    cells.append(f"{statistics.mean(r['s'] for r in results):.0f}")
    return "| " + " | ".join([name, *cells]) + " |"


def main() -> None:
    """Runs the locks and prints the table."""
    args = options()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    dataset = data.load(args.dataset)
    trials = trials_of(dataset, trials=args.trials)
    columns = ["lock", "n", "correlation", "SSIM", "PSNR", "identified", "floor, class mean", "floor, mean"]
    lines = ["| " + " | ".join([*columns, "loss", "s"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for lock in args.locks:
        lines.append(row(lock, attacked(args, lock, dataset, trials)))
        print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
