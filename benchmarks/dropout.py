"""What gradient matching sees of single images behind dropout: masks read off the gradient, and left out.

    python benchmarks/dropout.py [--trials 20] [--share 0.25] [--evaluations 300] [--seed 0]

MNIST test images, LeNet with dropout before its head, untrained, the label known, one gradient each; DLG. The
server that leaves dropout out has the same network without it. Needs MNIST. Prints one JSON line a server.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
from torch import nn

from fedkl import data, models
from fedkl.attacking import observe_gradient
from fedkl.attacks import DLG, Observation
from fedkl.metrics import Candidates, score, success_rate, summarize


def network(seed: int, share: float) -> nn.Module:
    """LeNet with PyTorch's initial weights, and dropout before its fully connected layer."""
    lenet = models.build_model("lenet", channels=3, classes=10, seed=seed, initialization="default")
    layers = dict(lenet.named_modules())
    head = next(name for name, layer in layers.items() if isinstance(layer, nn.Linear))
    lenet.set_submodule(head, nn.Sequential(nn.Dropout(share), layers[head]))
    return lenet


def without_dropout(observation: Observation) -> Observation:
    """The same update to a server that leaves dropout out."""
    model = network(0, 0.0)
    model.load_state_dict(observation.model.state_dict())
    return replace(observation, model=model)


def main() -> None:
    """Attacks the same images as three servers, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    mnist = data.load("mnist")
    images, labels = mnist.test_images[: chosen.trials], mnist.test_labels[: chosen.trials]
    candidates = Candidates(mnist.test_images[: max(100, chosen.trials)])

    def seen(share: float) -> list[Observation]:
        found = []
        for place in range(chosen.trials):
            torch.manual_seed(chosen.seed + place)  # what dropout draws
            model = network(chosen.seed + place, share)
            found.append(observe_gradient(model, images[[place]], labels[[place]], classes=10))
        return found

    dropped = seen(chosen.share)
    arms = {
        "no dropout": seen(0.0),
        "masks read": dropped,
        "dropout left out": [without_dropout(each) for each in dropped],
    }
    attack = DLG(evaluations=chosen.evaluations, weighting="sqrt")
    for name, observations in arms.items():
        generators = [torch.Generator().manual_seed(chosen.seed + place) for place in range(chosen.trials)]
        rebuilt = attack.reconstruct_many(observations, generators=generators)
        scores = [
            score(
                each.images,
                images[[place]],
                candidates=candidates,
                candidate_index=[place],
                scaling=each.scaling,
            )[0]
            for place, each in enumerate(rebuilt)
        ]
        line = {
            "server": name,
            "share": chosen.share,
            "trials": chosen.trials,
            "evaluations": chosen.evaluations,
            "seed": chosen.seed,
            "psnr": summarize([each.psnr for each in scores]).to_dict(),
            "identified": success_rate([float(each.identified) for each in scores], threshold=1.0)._asdict(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
