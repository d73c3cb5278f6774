"""What `fedkl.auditing.fits` names, right and wrong: counts of what it says of 50 clients a case.

python benchmarks/recorded_updates.py [lenet] [relu] [norms] [--clients 50]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkl import Procedure, data, models, rng
from fedkl.attacking.updates import local_update, trained_tensors
from fedkl.auditing import RecordedUpdate, Subject, fits

DATASET = data.load("mnist-sample")
IMAGES = torch.cat([DATASET.train_images[:], DATASET.test_images[:]])
LABELS = torch.cat([DATASET.train_labels, DATASET.test_labels])
SEEN, SUBJECTS, CLIENTS = range(1000), range(1000, 1500), range(1500, 2500)
Build = Callable[[], nn.Module]
GRADIENT, EPOCH = Procedure(), Procedure(algorithm="fedavg", batch_size=16, lr=0.05)
SETTINGS = {
    "gradient, B = 1": (GRADIENT, 1),
    "gradient, B = 8": (GRADIENT, 8),
    "one step, B = 8": (Procedure(algorithm="fedavg", lr=0.05), 8),
    "epoch, 64 by 16": (EPOCH, 64),
}


def lenet() -> nn.Module:
    """The sigmoid LeNet of gradient inversion."""
    return models.build_model("lenet", channels=3, classes=10, seed=0, initialization="uniform")


def relu() -> nn.Module:
    """Flower's quickstart, smaller."""
    features = (
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(400, 64), nn.ReLU(), nn.Linear(64, 10))


def norms() -> nn.Module:
    """Two convolutions with BatchNorm."""
    first = (nn.Conv2d(3, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    second = (nn.Conv2d(8, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(400, 10))


def trained(build: Build, seed: int, *, epochs: int, start: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A network after some epochs, of new weights or of given ones."""
    network = build()
    torch.manual_seed(seed)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if start is not None:
        network.load_state_dict(start)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2 if build is lenet else 2e-3)
    for epoch in range(epochs):
        order = torch.randperm(len(SEEN), generator=rng.generator(seed, "order", epoch))
        for batch in order.split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(IMAGES[batch]), LABELS[batch]).backward()
            optimizer.step()
    return network


def recorded(
    network: nn.Module,
    procedure: Procedure,
    count: int,
    *,
    number: int,
    pool: range = CLIENTS,
    mode: str = "train",
    factor: float = 1.0,
) -> RecordedUpdate:
    """A client's gradient, or the difference of its parameters."""
    chosen = pool.start + torch.randperm(len(pool), generator=rng.generator(number, "client"))[:count]
    x, y, how = IMAGES[chosen], LABELS[chosen], {"train_mode": mode == "train", "local": procedure}
    if procedure.is_gradient:
        tensors, kind = local_update(network, x, y, **how), "gradient"
    else:
        after, kind = trained_tensors(network, x, y, private=(), **how), "difference"
        tensors = {name: after[name] - p.detach() for name, p in network.named_parameters()}
    return RecordedUpdate(tensors={name: factor * t for name, t in tensors.items()}, kind=kind)


def cases(build: Build, base: nn.Module) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Whose update it is, and what is otherwise."""
    found = {
        "right": (base, {}),
        "right, seen images": (base, {"pool": SEEN}),
        "negated": (base, {"factor": -1.0}),
        "8 times": (base, {"factor": 8.0}),
        "untrained": (build(), {}),
        "other seed": (trained(build, 3, epochs=8), {}),
        "an epoch later": (trained(build, 9, epochs=1, start=base.state_dict()), {}),
    }
    return {**found, "eval mode": (base, {"mode": "eval"})} if build is norms else found


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=["lenet", "relu", "norms"])
    parser.add_argument("--clients", type=int, default=50)
    options = parser.parse_args()
    for name in options.networks:
        build = {"lenet": lenet, "relu": relu, "norms": norms}[name]
        base = trained(build, 1, epochs=8)
        for setting, (procedure, count) in SETTINGS.items():
            subject = Subject(
                model=build,
                images=IMAGES[SUBJECTS.start : SUBJECTS.stop],
                labels=LABELS[SUBJECTS.start : SUBJECTS.stop],
                weights=base.state_dict(),
                procedure=procedure,
                images_per_client=count,
            )
            for case, (network, otherwise) in cases(build, base).items():
                said = Counter()
                for number in range(options.clients):
                    update = recorded(network, procedure, count, number=number, **otherwise)
                    fit = fits(subject, update, generator=rng.generator(number, "played"))
                    said[", ".join(problem.about for problem in fit.problems) or "nothing"] += 1
                print(f"{name} | {setting} | {case} | {dict(said)}", flush=True)


if __name__ == "__main__":
    main()
