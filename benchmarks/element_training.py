"""What secrets per element cost a training, and what the server's model is worth, as a Markdown table.

    python benchmarks/element_training.py --dataset mnist --seeds 2

The designs that `fedkl.lock` does not have: γ and β per element that never train, each client's own, the same
for the whole cohort, or drawn afresh for every sample; and fresh noise on the standardized output of the
first layer. LeNet from U(±0.5), 3 clients, 20 rounds of one epoch on 2,000 images each.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from typing import Literal

import torch
from element_locks import DRAWS, Affine, behind_first_norm
from torch import Tensor, nn

from fedkl import data, models, rng
from fedkl.defenses import Defense, NoDefense
from fedkl.defenses.completion import Completion
from fedkl.federated import Execution, FederatedTraining, Federation, LocalTraining
from fedkl.keys import Key
from fedkl.locking import Split, withhold, withhold_statistics
from fedkl.metrics import evaluate

SHAPE = (12, 16, 16)
"""Of what LeNet's first convolution puts out."""

Shared = Literal["own", "cohort", "fresh"]


class Secret(Affine):
    """γ and β per element that do not train.

    Args:
        draw: Which of `DRAWS`.
        fresh: Whether every sample of a training batch draws its own.
    """

    def __init__(self, draw: str, *, fresh: bool) -> None:
        super().__init__(torch.ones(SHAPE), torch.zeros(SHAPE))
        self.requires_grad_(False)
        self.draw, self.fresh = draw, fresh

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draws both, as for another client."""
        drawn = self.drawn(SHAPE, generator)
        for parameter, values in zip((self.weight, self.bias), drawn, strict=True):
            parameter.data.copy_(values)

    def drawn(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """γ and β of a shape."""
        u, v = (torch.randn(shape, generator=generator) for _ in range(2))
        return DRAWS[self.draw](u, v)

    def forward(self, x: Tensor) -> Tensor:
        """γ ⊙ x + β."""
        if not self.fresh or not self.training:
            return super().forward(x)
        weight, bias = self.drawn(tuple(x.shape))
        return x * weight + bias


class SecretSplit(Split):
    """A model with a `Secret` behind its first norm.

    Args:
        model: The model, secret included.
        shared: Whose the secret is.
    """

    def __init__(self, model: nn.Module, secret: Secret, shared: Shared) -> None:
        super().__init__(model)
        self._secret, self._shared = secret, shared
        withhold(secret, ("weight", "bias"))
        withhold_statistics(model)

    def redraw(self) -> None:
        """A client's own γ and β, or the cohort's once more; fresh ones are 1 and 0 between batches."""
        if self._shared != "fresh":
            cohort = rng.generator(0, "cohort's secret")
            self._secret.redraw(cohort if self._shared == "cohort" else None)


@dataclass(frozen=True, kw_only=True)
class Secrets(Defense):
    """A private scale and shift per element behind LeNet's first convolution.

    Attributes:
        draw: Which of `DRAWS`.
        shared: Each client's own, one for the cohort, or drawn for every sample of every batch.
    """

    draw: str = "signs"
    shared: Shared = "own"

    def prepare(self, model: nn.Module, *, key: Key | None = None) -> Split:
        """Inserts a norm and the secret into a copy of the model."""
        secret = Secret(self.draw, fresh=self.shared == "fresh")
        own = behind_first_norm(model, secret)
        return SecretSplit(own, secret, self.shared)


ROWS: tuple[tuple[str, Defense], ...] = (
    ("nothing", NoDefense()),
    *(
        (f"{draw}, {shared}", Secrets(draw=draw, shared=shared))
        for draw in ("signs", "signed", "wide")
        for shared in ("own", "cohort")
    ),
    ("signs, fresh", Secrets(draw="signs", shared="fresh")),
    ("noise of +12 dB, fresh", Secrets(draw="noise-12", shared="fresh")),
    ("noise of +24 dB, fresh", Secrets(draw="noise-24", shared="fresh")),
)
LABELS = (10, 100, 1000)


def trained(
    name: str, defense: Defense, args: argparse.Namespace, seed: int, *, rounds: int
) -> dict[str, float]:
    """Accuracies after one training in percent: the clients' and those of the server's completions."""
    dataset = data.load(args.dataset)
    limit = args.images
    dataset = replace(
        dataset, train_images=dataset.train_images[:limit], train_labels=dataset.train_labels[:limit]
    )
    torch.manual_seed(seed)  # of the secrets, in this process only
    model = models.build_model(
        "lenet",
        channels=dataset.spec.shape[0],
        classes=dataset.spec.classes,
        seed=seed,
        initialization="uniform",
        normalization=(dataset.spec.mean, dataset.spec.std),
    )
    training = FederatedTraining(
        clients=3,
        rounds=max(rounds, 1),
        eval_every=max(rounds, 1),
        norm_statistics="kept",  # as the published figures
        local=LocalTraining(optimizer="adam", lr=0.003),
    )
    federation = Federation(
        model,
        defense=defense,
        dataset=dataset,
        training=training,
        seed=seed,
        execution=Execution(workers=1),  # one generator draws the fresh secrets
    )
    found = {}
    for result in federation.run() if rounds else ():
        if result.accuracy is not None:
            found["clients"] = 100 * result.accuracy
    if isinstance(defense, Secrets):
        found |= _server(defense, model, federation, dataset, seed)
    print(name, seed, {key: round(value, 2) for key, value in found.items()}, flush=True)
    return found


def _server(
    defense: Secrets, model: nn.Module, federation: Federation, dataset: data.Dataset, seed: int
) -> dict[str, float]:
    """The server puts in γ = 1 and β = 0, or fits them to labeled images of its own."""
    order = torch.randperm(len(dataset.test_labels), generator=rng.generator(seed, "auxiliary"))
    own, rest = order[: max(LABELS)], order[max(LABELS) :]
    images, labels = dataset.test_images[own], dataset.test_labels[own]
    test = dataset.test_images[rest], dataset.test_labels[rest]
    server = replace(defense, shared="own").prepare(model)  # γ = 1, β = 0, and nothing fresh
    server.load_public_state(federation.server.state)
    filled = Completion(server.bake().requires_grad_(True), server)
    accuracies = {"γ = 1, β = 0": evaluate(filled.with_statistics(images)[-1][1], *test)}
    for count in LABELS:
        refit = filled.refitted(images[:count], labels[:count], steps=200)
        completed = refit.with_statistics(images[:count])[-1][1]
        accuracies[f"{count:,} labels"] = evaluate(completed, *test)
    return {name: 100 * accuracy for name, accuracy in accuracies.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--images", type=int, default=6000, help="training images of all clients together")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    columns = ("clients", "γ = 1, β = 0", *(f"{count:,} labels" for count in LABELS))
    lines = [" | ".join(("secret", *columns)), " | ".join(["---"] * (len(columns) + 1))]
    # What the server's labels are worth by themselves.
    untrained = ("signs, before any training", Secrets(), 0)
    for name, defense, rounds in (untrained, *((*row, args.rounds) for row in ROWS)):
        found = [trained(name, defense, args, seed, rounds=rounds) for seed in range(args.seeds)]
        lines.append(" | ".join((name, *(_spread([one[c] for one in found if c in one]) for c in columns))))
    print("\n".join(f"| {line} |" for line in lines))


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
