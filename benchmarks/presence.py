"""Presence: how many images of a client the server recognizes, and whether the test itself is sound.

    python benchmarks/presence.py quickstart                       # the examples of examples/audit
    python benchmarks/presence.py quickstart --weights other.safetensors --seed 1
    python benchmarks/presence.py quickstart --whole --clients 4   # sums need more images
    python benchmarks/presence.py quickstart --whole --images 100 --clients 4 16
    python benchmarks/presence.py quickstart --whole --gradient --images 1 --clients 3 4 8 16 32 64
    python benchmarks/presence.py quickstart --defense keylock
    python benchmarks/presence.py quickstart --masking blind
    python benchmarks/presence.py resnet
    python benchmarks/presence.py private --epsilon 1 4 8 inf      # one step of DP-SGD on the quickstart

`private`: one gradient of 32 images by the defense dp-sgd, each clipped to norm 1, with noise for (ε, 1e-5)
by the exact curve of the Gaussian mechanism (Balle and Wang 2018). Beside what the test reaches stands what
no test can exceed at its own rate of false alarms, and at the ends of that rate's interval: Φ(Φ⁻¹(α) + 1/σ)
(Dong, Roth and Su 2022). One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import NormalDist
from time import process_time
from typing import Any

from fedkl.auditing import Subject
from fedkl.auditing.clients import Clients
from fedkl.auditing.defended import defense_of
from fedkl.auditing.plan import exposures_of
from fedkl.auditing.recognition import Pools, recognize
from fedkl.data import load
from fedkl.defenses import Defense
from fedkl.defenses.dp_sgd import DPSGD
from fedkl.protocol import Procedure

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "audit"
DELTA = 1e-5
BATCH = 32
CLIP = 1.0


def noise_of(epsilon: float) -> float:
    """σ of Gaussian noise, over the sensitivity, for (ε, 1e-5)-differential privacy of one release."""
    if math.isinf(epsilon):
        return 0.0
    low, high = 1e-2, 1e4
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _delta(middle, epsilon) > DELTA else (low, middle)
    return high


def _delta(sigma: float, epsilon: float) -> float:
    normal = NormalDist().cdf
    return normal(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * normal(-0.5 / sigma - epsilon * sigma)


def most(sigma: float, alarms: float) -> float:
    """The share that no test of one release can exceed, at a rate of false alarms."""
    return 1.0 if sigma == 0 else NormalDist().cdf(NormalDist().inv_cdf(alarms) + 1 / sigma)


def measured(
    subject: Subject, given: argparse.Namespace, *, clients: int, defense: Defense, **about: Any
) -> dict[str, Any]:
    """One line."""
    first = exposures_of(subject, defense=defense, masking=given.masking, batch_sizes=(), seed=given.seed)[0]
    exposure = first.exposure.model_copy(update={"clients": clients})
    people = Clients.of(
        subject,
        exposure=exposure,
        procedure=subject.procedure,
        defense=first.defense,
        seed=given.seed,
    )
    start = process_time()
    found = recognize(people, pools=Pools.of(subject.images, subject.labels, seed=given.seed))
    seconds = process_time() - start
    return {
        "subject": subject.name,
        "round": exposure.title,
        "clients": clients,
        "defense": first.defense.describe(),
        "seed": given.seed,
        **about,
        "recognized": rounded(found.share),
        "false_alarms": rounded(found.false_alarms),
        "swapped": rounded(found.swapped),
        "auc": rounded((found.auc, found.auc_low, found.auc_high)),
        "swapped_auc": round(found.swapped_auc, 3),
        "updates": found.clients,
        "seconds": round(seconds, 1),
        "seconds_each": round(seconds / (2 * found.clients), 2),
    }


def rounded(values: Sequence[float]) -> list[float]:
    """Three digits."""
    return [round(value, 3) for value in values]


def main() -> None:
    """Prints one JSON object a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=["quickstart", "resnet", "vit", "tiles", "private"])
    parser.add_argument("--weights")
    parser.add_argument("--clients", type=int, nargs="+", default=[1])
    parser.add_argument("--images", type=int, help="of a client")
    parser.add_argument("--gradient", action="store_true", help="each sends one gradient of all its images")
    parser.add_argument("--whole", action="store_true", help="all of CIFAR-10's test images")
    parser.add_argument("--defense", default="none")
    parser.add_argument("--masking", default="none")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 4.0, 8.0, math.inf])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    name = "quickstart" if given.subject == "private" else given.subject
    subject: Subject = import_module(name).subject()
    if given.weights:
        subject = replace(subject, weights=given.weights)
    if given.whole:
        cifar10 = load("cifar10")
        images = cifar10.test_images[: len(cifar10.test_labels)]
        subject = replace(subject, images=images, labels=cifar10.test_labels)
    if given.gradient:
        subject = replace(subject, procedure=Procedure())
    if given.images:
        subject = replace(subject, images_per_client=given.images)
    if given.subject != "private":
        for clients in given.clients:
            defense = defense_of(given.defense)
            print(json.dumps(measured(subject, given, clients=clients, defense=defense)), flush=True)
        return
    for epsilon in given.epsilon:
        sigma = noise_of(epsilon)
        private = replace(subject, procedure=Procedure(), images_per_client=BATCH)
        defense = DPSGD(clip=CLIP, noise_multiplier=sigma)
        line = measured(
            *(private, given), clients=1, defense=defense, epsilon=str(epsilon), sigma=round(sigma, 3)
        )
        # What false alarms there really are is known up to their interval.
        line["at_most"] = rounded([most(sigma, alarms) for alarms in line["false_alarms"][:3]])
        line["auc_at_most"] = 1.0 if sigma == 0 else round(NormalDist().cdf(1 / (sigma * math.sqrt(2))), 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
