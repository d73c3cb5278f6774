"""Accuracy under differential privacy at published settings: does fedkl's come to the published figures?

    fedkl data fetch mnist
    python benchmarks/private_training.py images --seeds 3    # DP-SGD as in Opacus's MNIST example
    python benchmarks/private_training.py clients --seeds 3   # each client's noise, or a trusted server's

`images`: `dp-sgd` on all of MNIST in one client, with the network and settings of Opacus's example
(`examples/mnist_README.md`: 15 epochs, lr 0.25, noise 1.3, clip 1.5, a share of .004 a batch; ε = 1.19 at
δ = 1e-5, accuracy 94.63 ± .34 % over ten runs).

`clients`: half of 100 clients with two shards of MNIST each take part in each of 11 rounds, as in Geyer et
al. 2017, whose server is trusted to add the noise once, for ε = 8 at δ = 1e-3: accuracy 78 % (their table 1).
Beside it `client-dp`, whose clients trust no server and each add as much. The trusted server is simulated by
1/√n of the noise from each of n clients: their mean then has the noise that the server would add. Its ε is of
a client that is there or not. One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from fedkl.data import Dataset, Shards, load
from fedkl.defenses import Defense
from fedkl.defenses.client_dp import ClientDP
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.federated import FederatedTraining, Federation, LocalTraining
from fedkl.federated.schedules import ConstantSchedule
from fedkl.privacy import GaussianCost, epsilon

RATE = 0.004


class Gray(nn.Module):
    """28 × 28 gray values, standardized, of fedkl's 3 × 32 × 32."""

    def forward(self, images: Tensor) -> Tensor:
        """Without the margin, and one channel of three equal ones."""
        return (images[:, :1, 2:-2, 2:-2] - 0.1307) / 0.3081


def network(seed: int) -> nn.Module:
    """That of Opacus's example: two convolutions, two linear layers, 26,010 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            Gray(),
            nn.Conv2d(1, 16, 8, stride=2, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(512, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )


def trained(
    dataset: Dataset, training: FederatedTraining, *, defense: Defense, seed: int
) -> tuple[float, float | None]:
    """Test accuracy of the last model in percent, and ε of the client that spent most."""
    federation = Federation(network(seed), defense=defense, dataset=dataset, training=training, seed=seed)
    last = list(federation.run())[-1]
    assert last.accuracy is not None
    spent = max(federation.ledger.spent.values()) if federation.ledger is not None else None
    return round(100 * last.accuracy, 2), spent


def of_images(dataset: Dataset, *, seeds: int) -> Iterator[dict[str, Any]]:
    """DP-SGD at Opacus's settings."""
    defense = DPSGD(clip=1.5, noise_multiplier=1.3)
    batch = round(RATE * len(dataset.train_labels))
    training = FederatedTraining(
        clients=1,
        rounds=15,
        local=LocalTraining(batch_size=batch, lr=0.25, momentum=0, weight_decay=0),
        schedule=ConstantSchedule(),
        eval_every=15,
    )
    for seed in range(seeds):
        accuracy, spent = trained(dataset, training, defense=defense, seed=seed)
        yield {"defense": defense.describe(), "seed": seed, "accuracy": accuracy, "epsilon": spent}


def of_clients(dataset: Dataset, *, seeds: int) -> Iterator[dict[str, Any]]:
    """Nobody's noise, a trusted server's, and each client's own."""
    training = FederatedTraining(
        clients=100,
        cohort=50,
        rounds=11,
        partition=Shards(per_client=2),
        local=LocalTraining(batch_size=10, lr=0.1, momentum=0, weight_decay=0),
        schedule=ConstantSchedule(),
        eval_every=11,
        eval_clients=1,
    )
    noise = noise_for(8.0, training, delta=1e-3)
    for seed in range(seeds):
        for who, share in (("nobody", 0.0), ("the server", 1 / math.sqrt(50)), ("each client", 1.0)):
            defense = ClientDP(clip=1.0, noise_multiplier=noise * share)
            accuracy, spent = trained(dataset, training, defense=defense, seed=seed)
            yield {
                "noise by": who,
                "noise": round(noise, 2),
                "seed": seed,
                "accuracy": accuracy,
                "epsilon": 8.0 if who == "the server" else spent,
            }


def noise_for(target: float, training: FederatedTraining, *, delta: float) -> float:
    """The noise over the clip with which a trusted server spends ε = `target`."""
    rate = training.cohort_size / training.clients

    def too_much(noise: float) -> float:
        cost = GaussianCost(noise_multiplier=noise, sampling_rate=rate, releases=1, protects="a client")
        return epsilon(cost, rounds=training.rounds, delta=delta) - target

    return float(brentq(too_much, 0.5, 50.0, xtol=1e-3))


def main() -> None:
    """Prints one JSON object a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("of", choices=["images", "clients"])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    dataset = load("mnist")
    torch.set_num_threads(1)
    lines = of_images if given.of == "images" else of_clients
    for line in lines(dataset, seeds=given.seeds):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
