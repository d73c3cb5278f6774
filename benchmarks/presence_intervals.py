"""Do the intervals of what is recognized hold the truth? Audits again and again, with other images.

    fedkl data fetch mnist
    python benchmarks/presence_intervals.py --images 600 --audits 24
    python benchmarks/presence_intervals.py --images 3000 --audits 12

An audit gets so many of MNIST's test images, and clients that train a small network for an epoch on 120 of
them. The truth for the attacker that it learned: the share of members that 24 more clients have at or above
the score that exactly 1 % of all other test images reach. (It is an estimate, too: the fewer of these, the
more often an interval misses it.) One JSON object a line: the share with its interval, the same at the
threshold as it was estimated, the truth. The last line counts.
"""

from __future__ import annotations

import argparse
import json
from statistics import mean

import torch
from torch import nn
from torch.nn import functional as F

from fedkl.auditing import Subject
from fedkl.auditing.defended import defense_of
from fedkl.auditing.plan import exposures_of
from fedkl.auditing.recognition import Pools, learn, recognize
from fedkl.data import Dataset, load
from fedkl.protocol import Procedure

SIZE, CLIENTS = 120, 24
LIMIT = 0.2  # of `--fail-above presence_tpr`


def network() -> nn.Module:
    """So small that an audit takes a second."""
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 48), nn.ReLU(), nn.Linear(48, 10))


def small(images: torch.Tensor) -> torch.Tensor:
    """14 × 14, gray."""
    return F.avg_pool2d(images.mean(1, keepdim=True)[..., 2:30, 2:30], 2)


def audited(whole: Dataset, *, count: int, seed: int) -> dict[str, object]:
    """One audit, and the truth."""
    images, labels = small(whole.test_images), whole.test_labels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    own, rest = order[:count], order[count:]
    subject = Subject(
        name="intervals",
        model=network,
        images=images[own],
        labels=labels[own],
        procedure=Procedure(algorithm="fedavg", epochs=1, batch_size=8, lr=0.05),
        images_per_client=SIZE,
    )
    pools = Pools.of(subject.images, subject.labels, seed=seed)
    clients = exposures_of(subject, defense=defense_of("none"), masking="none", batch_sizes=(), seed=seed)[0]
    found = recognize(clients, pools=pools)
    test = learn(clients, pools=pools)[0]  # the same attacker: it repeats from the seed
    others, classes = images[rest], labels[rest]
    updates, members = [], torch.zeros(CLIENTS, len(rest), dtype=torch.bool)
    for number in range(CLIENTS):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        places = torch.randperm(len(rest), generator=generator)[:SIZE]
        members[number, places] = True
        update = clients.update(others[places], classes[places], number=10_000 + number)
        updates.append(test.looked_at(update))
    kept = pools.kept_back.images, pools.kept_back.labels
    _, scores = test.both(updates, kept_back=kept, images=others, labels=classes)
    reached = scores[members] >= scores[~members].quantile(0.99)
    return {
        "seed": seed,
        "share": found.share[:3],
        "at_threshold": found.at_threshold[:3],
        "truth": float(reached.float().mean()),
    }


def main() -> None:
    """As the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=600, help="of an audit, 600 to 6,000")
    parser.add_argument("--audits", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    given = parser.parse_args()
    torch.set_num_threads(1)
    whole = load("mnist")
    lines = []
    for seed in range(given.seed, given.seed + given.audits):
        lines.append(audited(whole, count=given.images, seed=seed))
        print(json.dumps(lines[-1]), flush=True)
    held = {
        name: sum(line[name][1] <= line["truth"] <= line[name][2] for line in lines)
        for name in ("share", "at_threshold")
    }
    half = mean((line["share"][2] - line["share"][1]) / 2 for line in lines)
    wrong = {
        name: sum(line[name][2] <= LIMIT < line["truth"] for line in lines)
        for name in ("share", "at_threshold")
    }
    print(
        json.dumps(
            {"audits": len(lines), "hold the truth": held, "half an interval": half, "keep 20 %": wrong}
        )
    )


if __name__ == "__main__":
    main()
