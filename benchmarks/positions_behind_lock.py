"""A lock between the patches of a vision transformer and their positions, read by a server that knows of it.

    python benchmarks/positions_behind_lock.py --trials 5

The network of `examples/audit/vit.py`, its patch projection locked: a batch norm behind it whose γ and β
are private. The positions' gradient is δ, that of the norm's output. The projection's gradient is what
the norm's backward pass makes of δ, times the patches. There γ/σ is one unknown factor a feature, which
the direction of a row does not have. What is left is nonlinear in the image alone: Levenberg–Marquardt on
its scores on principal components of the server's own images, whose prior is let go of step by step.
Nothing is looked at but these two gradients. One JSON object an image: PSNR in dB cut to [0, 1],
correlation, the misfit that is left.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.func import jacrev
from torch.nn import functional as F

from fedkl.attacking import observe, trials_of
from fedkl.attacks.algebraic.pixels import PixelLayer, pixel_layers
from fedkl.auditing import target
from fedkl.data import load
from fedkl.defenses import KeyLock, own_arms
from fedkl.metrics import correlation, psnr
from fedkl.protocol import Observation

EXAMPLE = Path(__file__).parents[1] / "examples" / "audit" / "vit.py"
PROJECTION = "vit.embeddings.patch_embeddings.projection"
POSITIONS = "vit.embeddings.position_embeddings"
EPS = 1e-5
OWN_IMAGES = 1500


class Misfit:
    """How far the directions of the projection's rows are from those that an image would give."""

    def __init__(self, seen: Observation) -> None:
        (layer,) = pixel_layers(seen)
        self.layer: PixelLayer = layer
        patches = len(layer.pixels)
        slopes = seen.gradient[POSITIONS].flatten(0, -2)[-patches:].double()
        self.slopes = slopes - slopes.mean(0)
        self.weight = dict(seen.model.named_parameters())[f"{layer.name}.weight"].detach().flatten(1).double()
        self.rows = F.normalize(seen.gradient[f"{layer.name}.weight"].flatten(1).double())

    def __call__(self, image: Tensor) -> Tensor:
        """One number a feature and pixel of a patch, of an image's values in a row."""
        patches = image[self.layer.pixels] * self.layer.scale
        patches = patches - patches.mean(0)
        values = patches @ self.weight.T
        normed = values / (values.square().mean(0) + EPS).sqrt()
        back = self.slopes - normed * (self.slopes * normed).mean(0)
        return (F.normalize(back.T @ patches) - self.rows).flatten()


def solved(misfit: Misfit, own: Tensor, *, iterations: int) -> tuple[Tensor, float]:
    """The image, and the misfit that is left.

    Slopes are float64. `fedkl.attacks.matching.annealing` takes float32's, which is faster, and stopped here
    at a misfit of 2e-7, with 23 dB for an image of which this makes 46 and 59, with other keys.
    """
    mean = own.mean(0)
    _, sizes, directions = torch.linalg.svd(own - mean, full_matrices=False)
    basis = directions.T * (sizes / len(own) ** 0.5 + 1e-3)
    scores = torch.zeros(basis.shape[1], dtype=basis.dtype)
    prior, damping = 0.3, 1e-3

    def residuals(scores: Tensor) -> Tensor:
        return misfit(mean + basis @ scores)

    def cost(scores: Tensor) -> float:
        return float(residuals(scores).square().sum() + prior**2 * scores.square().sum())

    for _ in range(iterations):
        jacobian, now = jacrev(residuals, chunk_size=256)(scores), residuals(scores)
        curvature, slope = jacobian.T @ jacobian, jacobian.T @ now + prior**2 * scores
        before = after = cost(scores)
        for _ in range(8):
            bend = curvature + (prior**2 + damping) * torch.eye(len(scores), dtype=scores.dtype)
            moved = scores - torch.linalg.solve(bend, slope)
            after = cost(moved)
            if after < before:
                scores, damping = moved, max(damping / 4, 1e-9)
                break
            damping *= 4
        if after > 0.95 * before:  # as far as this prior lets it
            prior, damping = max(prior / 2, 1e-6), min(damping, 1e-3)
    return mean + basis @ scores, float(residuals(scores).square().mean())


def main() -> None:
    """Prints one JSON object a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--trained", action="store_true", help="the example's weights")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="This model is trained")
    subject = target.load(f"{EXAMPLE}:subject").subject
    network = (subject if given.trained else replace(subject, weights=None)).classifier()
    dataset, defense = load("mnist-sample", size=28, channels=1), KeyLock(layers=(PROJECTION,))
    arm = own_arms(defense)["lock"]
    for trial in trials_of(dataset, trials=given.trials):
        seen = observe(defense.prepare(network), arm=arm, model=network, trial=trial, classes=10)
        own = dataset.train_images[:OWN_IMAGES].double().flatten(1)
        found, left = solved(Misfit(seen), own, iterations=given.iterations)
        images = found.view(trial.images.shape).float()
        line = {"image": trial.index, "psnr": round(float(psnr(images.clamp(0, 1), trial.images)), 1)}
        line |= {"correlation": round(float(correlation(images, trial.images)), 4), "misfit": left}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
