"""GGL's evaluations: a whole population at once against one candidate at a time, on the same candidates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkl import data, models
from fedkl.attacking import full_gradient
from fedkl.attacks import GGL, Observation
from fedkl.attacks.generators.files import load_generator
from fedkl.attacks.matching.ggl import _Candidates, _Drawing

POPULATION = 50
ROUNDS = 5


def one_at_a_time(observation: Observation, draw: _Drawing, u: Tensor) -> Tensor:
    """Losses as a plain loop computes them."""
    parameters = dict(observation.model.named_parameters())
    size = sum(g.square().sum() for g in observation.gradient.values())
    losses = []
    for candidate in u:
        with torch.no_grad():
            image = draw(candidate[None], observation.labels)
        loss = F.cross_entropy(observation.model(image), observation.labels)
        gradient = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        differences = [(gradient[name] - g).square().sum() for name, g in observation.gradient.items()]
        losses.append(sum(differences) / size)
    return torch.stack(losses)


@torch.no_grad()
def at_once(matching: _Candidates, draw: _Drawing, label: Tensor, u: Tensor) -> Tensor:
    """Losses as GGL computes them."""
    return matching.losses(draw(u, label), label)


def seconds(run: Callable[[], Tensor]) -> float:
    """How long one call takes."""
    start = perf_counter()
    run()
    return perf_counter() - start


def main() -> None:
    """Prints evaluations per second of both ways, and their ratio, for two networks."""
    torch.set_num_threads(1)
    dataset = data.load("mnist-sample")
    image, label = dataset.test_images[:1].contiguous(), dataset.test_labels[:1]
    draw = _Drawing(load_generator("mnist"), (3, 32, 32), GGL().bound)
    u = torch.randn(POPULATION, draw.latent, generator=torch.Generator().manual_seed(0))
    print("| network | one at a time, evaluations/s | at once, evaluations/s | ratio |\n|---|---:|---:|---:|")
    for name in ("lenet", "resnet20"):
        model = models.build_model(name, channels=3, classes=10, seed=0, initialization="default")
        observation = Observation(
            model=model,
            gradient=full_gradient(model, image, label),
            image_shape=(3, 32, 32),
            classes=10,
            batch_size=1,
            labels=label,
        )
        matching = _Candidates([observation], labels=[label], dtype=torch.float32)
        slow, fast = one_at_a_time(observation, draw, u), at_once(matching, draw, label, u)
        torch.testing.assert_close(fast, slow, rtol=1e-2, atol=1e-4)
        times = [  # in turn, so that both see the same load of the machine
            (
                seconds(partial(one_at_a_time, observation, draw, u)),
                seconds(partial(at_once, matching, draw, label, u)),
            )
            for _ in range(ROUNDS)
        ]
        one, many = (POPULATION / sorted(column)[ROUNDS // 2] for column in zip(*times, strict=True))
        print(f"| {name} | {one:.0f} | {many:.0f} | {many / one:.1f} |")


if __name__ == "__main__":
    main()
