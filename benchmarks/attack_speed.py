"""Time of the attacks, against the same attack as a plain PyTorch loop, one observation after another.

Both sides have the same model, objective, optimizer, budget and stopping. The plain loop may use one or two
threads, whichever is faster on this machine; fedkl uses `--workers` threads. Rounds of both sides alternate.

    python benchmarks/attack_speed.py --attack ig                  # ms per trial and iteration
    python benchmarks/attack_speed.py --attack grnn
    python benchmarks/attack_speed.py --attack dlg --trials 20     # seconds until 90 % succeeded
    python benchmarks/attack_speed.py --attack ig --model resnet20 --data cifar10

For DLG, all evaluated points are kept with their time and scored when the clock has stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedkl.attacks.matching.dlg
from fedkl import data, models
from fedkl.attacking import full_gradient
from fedkl.attacks import DLG, Attack, Observation
from fedkl.attacks.matching.grnn import GRNN
from fedkl.attacks.matching.inverting import InvertingGradients
from fedkl.attacks.matching.objectives import GradientMatching
from fedkl.metrics import psnr

SUCCESS = 30.0  # dB


@dataclass(frozen=True)
class Case:
    """One trial: what the server observed, and the truth that only the scoring sees."""

    observation: Observation
    truth: Tensor


@dataclass(frozen=True)
class Seen:
    """A point that was evaluated: by which trial, when, and its image."""

    trial: int
    seconds: float
    image: Tensor


def cases(model: str, dataset: str, count: int, initialization: models.ModelInitialization) -> list[Case]:
    """Trials with a model and an image each; norms in eval mode."""
    loaded = data.load(dataset)
    spec = loaded.spec
    found = []
    for i in range(count):
        net = models.build_model(
            model, channels=spec.shape[0], classes=spec.classes, seed=i, initialization=initialization
        )
        image, label = loaded.test_images[i : i + 1].contiguous(), loaded.test_labels[i : i + 1]
        observation = Observation(
            model=net,
            gradient=full_gradient(net, image, label, train_mode=False),
            image_shape=spec.shape,
            classes=spec.classes,
            batch_size=1,
            train_mode=False,
            labels=label,
        )
        found.append(Case(observation, image))
    return found


# --- plain loops


def dummy_gradient(net: nn.Module, image: Tensor, label: Tensor) -> list[Tensor]:
    """The gradient of the dummy image's loss, differentiable."""
    loss = F.cross_entropy(net(image), label)
    return list(torch.autograd.grad(loss, list(net.parameters()), create_graph=True))


def prepared(case: Case, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor], Tensor]:
    """Network, observed gradient and label."""
    net = case.observation.model.to(dtype).eval()
    observed = [case.observation.gradient[name].to(dtype) for name, _ in net.named_parameters()]
    labels = case.observation.labels
    assert labels is not None
    return net, observed, labels


def plain_ig(case: Case, attack: InvertingGradients) -> None:
    """Inverting Gradients for one observation."""
    net, observed, label = prepared(case, torch.float32)
    image = (0.5 + 0.25 * torch.randn_like(case.truth)).clamp(0, 1).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.25 * attack.lr)
    milestones = [attack.iterations * part // 8 for part in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    best, chosen = math.inf, image.detach().clone()
    for _ in range(attack.iterations):
        optimizer.zero_grad()
        dummy = dummy_gradient(net, image, label)
        product, ours, theirs = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for d, g in zip(dummy, observed, strict=True):
            product, ours, theirs = (
                product + (d * g).sum(),
                ours + d.square().sum(),
                theirs + g.square().sum(),
            )
        vertical = (image[..., 1:, :] - image[..., :-1, :]).abs().mean()
        horizontal = (image[..., :, 1:] - image[..., :, :-1]).abs().mean()
        loss = 1 - product / (ours * theirs).sqrt() + 4 * attack.tv * (vertical + horizontal)
        (image.grad,) = torch.autograd.grad(loss, [image])
        image.grad.sign_()
        if float(loss.detach()) < best:
            best, chosen = float(loss.detach()), image.detach().clone()
        optimizer.step()
        schedule.step()
        image.data.clamp_(0, 1)
    assert chosen.isfinite().all()


class UpBlock(nn.Module):
    """Upsampling, convolution, norm, GLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 2 * outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Twice the height and width."""
        return F.glu(self.norm(self.conv(F.interpolate(x, scale_factor=2.0))), 1)


class PlainGenerator(nn.Module):
    """The generator of GRNN for 32×32."""

    def __init__(self, latent: int, channels: int) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(latent, 256, 4)
        self.blocks = nn.Sequential(UpBlock(128, 64), UpBlock(64, 32), UpBlock(32, channels))

    def forward(self, z: Tensor) -> Tensor:
        """An image in [0, 1]."""
        image: Tensor = self.blocks(F.glu(self.first(z[..., None, None]), 1)).sigmoid()
        return image


def plain_grnn(case: Case, attack: GRNN) -> None:
    """GRNN for one observation."""
    net, observed, label = prepared(case, torch.float32)
    generator = PlainGenerator(attack.latent, case.truth.shape[1])
    z = torch.randn(1, attack.latent)
    optimizer = torch.optim.RMSprop(generator.parameters(), lr=attack.lr, momentum=attack.momentum)
    best, chosen = math.inf, case.truth
    for _ in range(attack.iterations):
        optimizer.zero_grad()
        image = generator(z)
        dummy = dummy_gradient(net, image, label)
        squared = torch.zeros(())
        for d, g in zip(dummy, observed, strict=True):
            squared = squared + (d - g).square().sum()
        vertical = (image[..., 1:, :] - image[..., :-1, :]).square().mean()
        horizontal = (image[..., :, 1:] - image[..., :, :-1]).square().mean()
        loss = squared + squared.sqrt() + attack.tv * 2 * (vertical + horizontal)
        loss.backward()
        if float(loss.detach()) < best:
            best, chosen = float(loss.detach()), image.detach().clone()
        optimizer.step()
    assert chosen.isfinite().all()


class Finished(Exception):  # noqa: N818 - no error: the way out of torch's L-BFGS
    """Budget, value or progress say that a trial ends."""


def plain_dlg(case: Case, attack: DLG, seen: Callable[[Tensor], None], seed: int) -> None:
    """DLG for one observation with torch's L-BFGS, restarted wherever it stops of itself."""
    net, observed, label = prepared(case, torch.float64)
    power = {"none": 0, "sqrt": 1, "full": 2}[attack.weighting]
    weights = [float(g.norm()) ** -power for g in observed]
    size = sum(w * float(g.square().sum()) for w, g in zip(weights, observed, strict=True))
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(case.truth.shape, generator=generator, dtype=torch.float64).requires_grad_()
    # Its own tolerances would stop it long before the image is found: the objective is relative, and small.
    optimizer = torch.optim.LBFGS(
        [image],
        lr=1,
        max_iter=20,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=attack.history,
        line_search_fn="strong_wolfe",
    )
    values: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        dummy = dummy_gradient(net, image, label)
        loss = torch.zeros((), dtype=torch.float64)
        for w, d, g in zip(weights, dummy, observed, strict=True):
            loss = loss + w / size * (d - g).square().sum()
        (image.grad,) = torch.autograd.grad(loss, [image])
        seen(image.detach())
        values.append(float(loss.detach()))
        stalled = len(values) % 400 == 0 and len(values) > 400 and min(values) > 0.999 * min(values[:-400])
        if len(values) >= attack.evaluations or values[-1] <= 1e-12 or stalled or math.isnan(values[-1]):
            raise Finished
        return loss

    try:
        before = -2
        while len(values) > before + 1:  # one evaluation without a step: nothing moves any more
            before = len(values)
            optimizer.step(closure)
    except Finished:
        pass
    finally:
        case.observation.model.float()


# --- measurements


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for single operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def per_iteration(attack: Attack, found: list[Case], options: argparse.Namespace) -> dict[str, object]:
    """Milliseconds per trial and iteration of both sides."""

    def ours() -> int:
        generators = [torch.Generator().manual_seed(i) for i in range(len(found))]
        attack.reconstruct_many(
            [case.observation for case in found], generators=generators, workers=options.workers
        )
        return len(found)

    def plain(count: int) -> int:
        with threads(count):
            for case in found[: options.plain_trials]:
                if isinstance(attack, GRNN):
                    plain_grnn(case, attack)
                elif isinstance(attack, InvertingGradients):
                    plain_ig(case, attack)
        return min(len(found), options.plain_trials)

    sides = {"fedkl": ours, "plain, 1 thread": lambda: plain(1), "plain, 2 threads": lambda: plain(2)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            start, busy_start = time.perf_counter(), time.process_time()
            unit = 1e3 / side() / options.iterations
            times[name].append(unit * (time.perf_counter() - start))
            busy[name].append(unit * (time.process_time() - busy_start))
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    cpu = {name: round(statistics.median(values), 3) for name, values in busy.items()}
    ratios = [
        min(times["plain, 1 thread"][i], times["plain, 2 threads"][i]) / times["fedkl"][i]
        for i in range(options.rounds)
    ]
    return {"ms per trial-iteration": medians, "CPU ms": cpu, "ratio": round(statistics.median(ratios), 2)}


def until_success(seen: list[Seen], found: list[Case]) -> tuple[float, int]:
    """Seconds until 90 % of the trials had a point of 30 dB (inf: never), and how many ever had one."""
    first: dict[int, float] = {}
    for point in sorted(seen, key=lambda s: s.seconds):
        truth = found[point.trial].truth
        if point.trial not in first and float(psnr(point.image.clamp(0, 1), truth)[0]) >= SUCCESS:
            first[point.trial] = point.seconds
    needed = math.ceil(0.9 * len(found))
    times = sorted(first.values())
    return (times[needed - 1] if len(times) >= needed else math.inf), len(times)


def dlg_ours(attack: DLG, found: list[Case], workers: int) -> list[Seen]:
    """All points that fedkl evaluated."""
    seen: list[Seen] = []
    numbers = {id(case.observation): i for i, case in enumerate(found)}
    start = time.perf_counter()

    class Recorded(GradientMatching):
        def __init__(self, observations: list[Observation], **rest: object) -> None:
            super().__init__(observations, **rest)  # type: ignore[arg-type]
            self._trials = [numbers[id(o)] for o in observations]

        def __call__(self, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            found = super().__call__(points, index)
            now = time.perf_counter() - start
            images = self.images(points).float()
            seen.extend(Seen(self._trials[i], now, images[r]) for r, i in enumerate(index.tolist()))
            return found

    fedkl.attacks.matching.dlg.GradientMatching = Recorded  # type: ignore[misc]
    try:
        generators = [torch.Generator().manual_seed(i) for i in range(len(found))]
        attack.reconstruct_many([c.observation for c in found], generators=generators, workers=workers)
    finally:
        fedkl.attacks.matching.dlg.GradientMatching = GradientMatching  # type: ignore[misc]
    return seen


def dlg_plain(attack: DLG, found: list[Case], count: int) -> list[Seen]:
    """All points that the plain loop evaluated."""
    seen: list[Seen] = []
    start = time.perf_counter()
    with threads(count):
        for trial, case in enumerate(found):

            def keep(image: Tensor, trial: int = trial) -> None:
                seen.append(Seen(trial, time.perf_counter() - start, image.float()))

            plain_dlg(case, attack, keep, trial)
    return seen


def time_to_success(attack: DLG, found: list[Case], options: argparse.Namespace) -> dict[str, object]:
    """Seconds until 90 % of the trials have succeeded, of both sides."""
    sides: dict[str, Callable[[], list[Seen]]] = {
        "fedkl": lambda: dlg_ours(attack, found, options.workers),
        "plain, 1 thread": lambda: dlg_plain(attack, found, 1),
    }
    if options.plain_threads == 2:
        sides["plain, 2 threads"] = lambda: dlg_plain(attack, found, 2)
    report: dict[str, object] = {}
    seconds: dict[str, float] = {}
    whole: dict[str, float] = {}
    for name, side in sides.items():
        start = time.perf_counter()
        seen = side()
        whole[name] = time.perf_counter() - start
        seconds[name], succeeded = until_success(seen, found)
        report[name] = {
            "seconds to 90 %": round(seconds[name], 1),
            "succeeded": succeeded,
            "whole run": round(whole[name], 1),
            "ms per evaluation": round(1e3 * whole[name] / len(seen), 2),
        }
    # A plain loop whose budget ended below 90 % would have needed more than its whole run.
    plain = min(min(value, whole[name]) for name, value in seconds.items() if name != "fedkl")
    at_least = all(math.isinf(value) for name, value in seconds.items() if name != "fedkl")
    ratio = None if math.isinf(seconds["fedkl"]) else round(plain / seconds["fedkl"], 2)
    return report | {"ratio": ratio, "ratio is a lower bound": at_least}


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attack", choices=["dlg", "ig", "grnn"], required=True)
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--data", default="mnist-sample")
    parser.add_argument("--initialization", choices=["default", "uniform"], default="uniform")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--plain-trials", type=int, default=2, help="ig, grnn: the plain loop's share")
    parser.add_argument("--plain-threads", type=int, choices=[1, 2], default=2, help="dlg: tried up to")
    parser.add_argument("--iterations", type=int, default=20, help="ig, grnn: timed iterations")
    parser.add_argument("--evaluations", type=int, default=2000, help="dlg: budget of a trial")
    parser.add_argument("--weighting", choices=["none", "sqrt", "full"], default="none", help="dlg")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = cases(options.model, options.data, options.trials, options.initialization)
    if options.attack == "dlg":
        dlg = DLG(evaluations=options.evaluations, weighting=options.weighting)
        report = time_to_success(dlg, found, options)
    else:
        attack = (GRNN if options.attack == "grnn" else InvertingGradients)(iterations=options.iterations)
        report = per_iteration(attack, found, options)
    load = [round(value, 1) for value in os.getloadavg()]
    print(json.dumps(vars(options) | report | {"load": load}, ensure_ascii=False))


if __name__ == "__main__":
    main()
