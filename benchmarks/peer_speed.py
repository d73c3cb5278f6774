"""Time and quality of our attacks beside a peer's own loop, on the same trials, in one run.

The peer's code is not part of fedkl: clone it and name the folder. Its loop runs unmodified; what it imports
and does not use here (torchvision, matplotlib) is stood in for.

    git clone https://github.com/JonasGeiping/invertinggradients
    OMP_NUM_THREADS=1 python benchmarks/peer_speed.py --peer ig --checkout invertinggradients
    git clone https://github.com/mit-han-lab/dlg
    OMP_NUM_THREADS=1 python benchmarks/peer_speed.py --peer dlg --checkout dlg

`ig`: `inversefed.GradientReconstructor`, signed Adam on the cosine distance with total variation. Networks,
gradients, labels, starts, step sizes, schedule, box and iterations are the same, so that quality must agree.

`dlg`: main.py, L-BFGS on the summed squared difference, labels optimized along, 300 calls of 20 iterations or
the budget of evaluations, whichever ends first. Its L-BFGS is in float32 without line search, ours in float64
with one; starts differ. Objective and method are the same, then, but not the points: compare quality too.

Sides take turns, on one core and on two: there we share the trials out among two threads, the peer runs in
two processes with one thread and half of the trials each. That is kinder to it than two threads for every
operation, PyTorch's own way. On a busy machine, trust the CPU times.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from attack_speed import Case, cases
from torch import Tensor, nn

from fedkl.attacks import DLG, Attack
from fedkl.attacks.matching.inverting import InvertingGradients
from fedkl.metrics import psnr

UNITS = ("ms per evaluation", "CPU ms per evaluation", "seconds")


@dataclass(frozen=True)
class Side:
    """What one side did in one round: its images, and how many evaluations of the objective in all trials."""

    images: list[Tensor]
    evaluations: int


def starts(found: list[Case]) -> list[torch.Generator]:
    """What both sides draw their starts from; it depends on a trial's truth only."""
    return [torch.Generator().manual_seed(int(1e6 * case.truth.double().mean())) for case in found]


# --- peers


@contextlib.contextmanager
def standing_in(modules: dict[str, Any]) -> Iterator[None]:
    """While a peer is imported or runs: modules in place of others, and silence."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:  # what else was imported meanwhile stays: patch.dict would take it out again
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def inversefed(checkout: Path) -> ModuleType:
    """The module of the peer's reconstruction, without its networks and data sets, which want torchvision."""
    package, networks = ModuleType("inversefed"), MagicMock()
    package.__path__ = [str(checkout / "inversefed")]
    with standing_in({"inversefed": package, "inversefed.nn": networks, "torchvision": MagicMock()}):
        return import_module("inversefed.reconstruction_algorithms")


def peer_ig(module: ModuleType, attack: InvertingGradients, found: list[Case]) -> Side:
    """The peer's Inverting Gradients, in the units of pixels in [0, 1], as our networks want them."""
    images = []
    for case, generator in zip(found, starts(found), strict=True):
        observation, shape = case.observation, case.truth.shape
        config = {
            "signed": True, "boxed": True, "restarts": 1, "init": "randn", "lr_decay": True, "filter": "none",
            "cost_fn": "sim", "indices": "def", "weights": "equal", "optim": "adam", "scoring_choice": "loss",
            "lr": attack.lr / 4, "total_variation": attack.tv * 4, "max_iterations": attack.iterations,
        }  # fmt: skip
        zero, one = torch.zeros(shape[1], 1, 1), torch.ones(shape[1], 1, 1)
        peer = module.GradientReconstructor(observation.model, (zero, one), config=config)
        start = (0.5 + 0.25 * torch.randn(shape, generator=generator)).clamp(0, 1)
        peer._init_images = lambda _, start=start: start[None].clone()
        gradient = [observation.gradient[name] for name, _ in observation.model.named_parameters()]
        with contextlib.redirect_stdout(io.StringIO()):
            images.append(peer.reconstruct(gradient, observation.labels, tuple(shape[1:]))[0])
    return Side(images, attack.iterations * len(found))


class Finished(Exception):  # noqa: N818 - no error: the way out of the peer's script
    """The budget is spent."""


class Counted(nn.Module):
    """A network that counts its forwards: the peer makes one for each evaluation of its objective.

    Attributes:
        calls: So far.
        seen: What it was last called with: the peer's dummy image.
    """

    def __init__(self, network: nn.Module, budget: int) -> None:
        super().__init__()
        self.network, self.calls, self._budget = network, 0, budget
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """The network's own."""
        if self.calls > self._budget:  # the first call was the client's
            raise Finished
        self.calls, self.seen = self.calls + 1, x.detach().clone()
        logits: Tensor = self.network(x)
        return logits


def peer_dlg(checkout: Path, budget: int, found: list[Case]) -> Side:
    """The peer's script, on our networks and images instead of its LeNet and CIFAR-100."""
    images, evaluations = [], 0
    for case in found:
        observation = case.observation
        assert observation.labels is not None
        counted = Counted(observation.model, budget)
        utils = SimpleNamespace(**runpy.run_path(str(checkout / "utils.py")))
        utils.label_to_onehot = partial(utils.label_to_onehot, num_classes=observation.classes)
        torchvision, plots, vision = MagicMock(), MagicMock(), MagicMock()
        torchvision.configure_mock(__version__="none")
        torchvision.datasets.CIFAR100.return_value = defaultdict(
            lambda case=case: (case.truth[0], int(case.observation.labels))
        )
        torchvision.transforms.ToTensor.return_value = lambda image: image
        vision.LeNet.return_value, vision.weights_init = counted, lambda module: None
        named = {
            "torchvision": torchvision,
            "matplotlib": plots,
            "matplotlib.pyplot": plots,
            "models": vision,
        }
        with standing_in(named | {"models.vision": vision, "utils": utils}):
            with patch.object(sys, "argv", ["main.py"]), contextlib.suppress(Finished):
                runpy.run_path(str(checkout / "main.py"))
        images.append(counted.seen)
        evaluations += counted.calls - 1
    return Side(images, evaluations)


# --- measurements


def ours(attack: Attack, found: list[Case], *, workers: int, labels_known: bool) -> Side:
    """All trials as one batch, on so many threads."""
    observations = [
        case.observation if labels_known else replace(case.observation, labels=None) for case in found
    ]
    results = attack.reconstruct_many(observations, generators=starts(found), workers=workers)
    return Side([result.images for result in results], sum(result.evaluations for result in results))


def in_processes(run: Callable[[list[Case]], Side], found: list[Case]) -> Side:
    """Runs a side in two processes of one thread, each with every other trial."""
    context = get_context("fork")  # which needs not send what the processes start from
    receivers, workers = [], []
    for half in (found[::2], found[1::2]):
        receiver, sender = context.Pipe(duplex=False)
        workers.append(context.Process(target=sent, args=(sender, run, half)))
        receivers.append(receiver)
        workers[-1].start()
    halves = [receiver.recv() for receiver in receivers]
    for worker in workers:
        worker.join()
    images = [torch.from_numpy(halves[i % 2][0][i // 2]) for i in range(len(found))]
    return Side(images, sum(evaluations for _, evaluations in halves))


def sent(sender: Connection, run: Callable[[list[Case]], Side], found: list[Case]) -> None:
    """Runs a side in this process and sends what it did."""
    side = run(found)
    sender.send(([image.numpy() for image in side.images], side.evaluations))


def quality(side: Side, found: list[Case]) -> dict[str, object]:
    """PSNR of the clipped images, in dB; an image that is not finite has none."""
    pairs = zip(side.images, found, strict=True)
    values = [float(psnr(i.clamp(0, 1), case.truth)[0]) for i, case in pairs if bool(i.isfinite().all())]
    return {
        "PSNR": [round(value, 1) for value in values],
        "median PSNR": round(statistics.median(values), 1) if values else None,
        "not finite": len(found) - len(values),
    }


def measured(sides: dict[str, Callable[[], Side]], found: list[Case], rounds: int) -> dict[str, object]:
    """Times of sides that take turns, and their quality, which is the same in every round."""
    times: dict[str, dict[str, list[float]]] = {name: {unit: [] for unit in UNITS} for name in sides}
    report: dict[str, dict[str, object]] = {}
    for _ in range(rounds):
        for name, run in sides.items():
            wall, busy = time.perf_counter(), sum(os.times()[:4])
            side = run()
            wall, busy = time.perf_counter() - wall, sum(os.times()[:4]) - busy
            each = 1e3 / side.evaluations
            for unit, value in zip(UNITS, (each * wall, each * busy, wall), strict=True):
                times[name][unit].append(value)
            report[name] = {"evaluations": side.evaluations} | quality(side, found)
    for name in sides:
        report[name] |= {unit: spread(values) for unit, values in times[name].items()}
    ratios = {
        f"{unit}, {cores}": spread([theirs / own for own, theirs in zip(*pair, strict=True)])
        for cores in ("1 core", "2 cores")
        for unit in UNITS
        for pair in [(times[f"fedkl, {cores}"][unit], times[f"peer, {cores}"][unit])]
    }
    return {"sides": report, "peer / fedkl": ratios}


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["ig", "dlg"], required=True)
    parser.add_argument("--checkout", type=Path, required=True, help="the peer's repository")
    parser.add_argument("--data", default="mnist-sample")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=100, help="ig: the budget")
    parser.add_argument("--evaluations", type=int, default=6000, help="dlg: the budget")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = cases("lenet", options.data, options.trials, "uniform")
    ours(InvertingGradients(iterations=2), found, workers=1, labels_known=True)  # PyTorch's first is slow
    attack: Attack
    if options.peer == "ig":
        attack, module = InvertingGradients(iterations=options.iterations), inversefed(options.checkout)
        theirs: Callable[[list[Case]], Side] = partial(peer_ig, module, attack)
    else:
        attack = DLG(evaluations=options.evaluations)
        theirs = partial(peer_dlg, options.checkout, options.evaluations)
    own = partial(ours, attack, found, labels_known=options.peer == "ig")
    sides = {
        "fedkl, 1 core": partial(own, workers=1),
        "peer, 1 core": partial(theirs, found),
        "fedkl, 2 cores": partial(own, workers=2),
        "peer, 2 cores": partial(in_processes, theirs, found),
    }
    report = measured(sides, found, options.rounds)
    load = [round(value, 1) for value in os.getloadavg()]
    described = vars(options) | {"checkout": options.checkout.name, "load": load}
    print(json.dumps(described | report, indent=1))


if __name__ == "__main__":
    main()
