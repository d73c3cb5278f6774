"""Trainings with masked updates, and what the server can make of what it has.

    python benchmarks/masked_training.py accuracy --data mnist --model lenet --clients 3 10 --rounds 16
    python benchmarks/masked_training.py accuracy --data cifar10 --model resnet20 --clients 3 --rounds 2
    python benchmarks/masked_training.py server --data mnist --model lenet --clients 3 --rounds 16

`accuracy`: in every round of a masked training the same updates are averaged in the clear too; the largest
difference of a weight is noted. A plain training with the same keys and batches stands beside it; with
--nudge another plain one, in which every averaged weight is moved up or down by so much: what rounding alone
makes of a training.

`server`: after a blind training, the server fine-tunes what it has on labeled images of its own: the model
that it started from, and the words of the last sum taken for weights. Beside it: a training on the same
images from scratch, and the members' model. One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import data, models, rng
from fedkl.aggregation import (
    Aggregation,
    FederationPlan,
    MaskedAggregation,
    PlainAggregation,
    RoundAggregation,
    RoundPlan,
    SeenUpload,
    weighted_average,
)
from fedkl.data import Dataset, Dirichlet, Subset
from fedkl.defenses import Defense, KeyLock, NoDefense
from fedkl.federated import Execution, FederatedTraining, Federation, LocalTraining
from fedkl.metrics import evaluate
from fedkl.update import PublicUpdate

MODES = ("blind", "pairwise", "both")
LABELED = (10, 100, 1000)
STEPS = 300


class Compared(Aggregation):
    """An aggregation that also averages in the clear, and notes the difference.

    Args:
        inner: The masked one; or a plain one, with a nudge.
        nudge: Every averaged number is moved up or down by so much.
    """

    type = "compared"

    def __init__(self, inner: Aggregation, *, nudge: float = 0.0) -> None:
        self.inner, self.nudge = inner, nudge
        self.differences: list[float] = []

    @property
    def server_learns(self) -> Any:
        """As the masked one."""
        return self.inner.server_learns

    def for_federation(self, plan: FederationPlan) -> Compared:
        """Of the masked one."""
        self.inner = self.inner.for_federation(plan)
        return self

    def begin(self, plan: RoundPlan, *, record: bool = False) -> ComparedRound:
        """A round of both."""
        return ComparedRound(self, plan, record=record)


class ComparedRound(RoundAggregation[PublicUpdate, dict[str, Tensor]]):
    """One round of both."""

    def __init__(self, owner: Compared, plan: RoundPlan, *, record: bool) -> None:
        super().__init__(plan.clients)
        self._owner, self._inner = owner, owner.inner.begin(plan, record=record)
        self._updates: list[PublicUpdate] = []

    @property
    def update_bytes(self) -> int:
        """Of the masked one."""
        return self._inner.update_bytes

    @property
    def enough(self) -> bool:
        """Of the masked one."""
        return self._inner.enough

    def what_the_server_sees(self) -> Any:
        """Of the masked one."""
        return self._inner.what_the_server_sees()

    def _take(self, client: str, update: PublicUpdate) -> None:
        self._inner.offer(client, update)
        self._updates.append(update)

    def _leave(self, client: str) -> None:
        self._inner.drop(client)

    def _result(self) -> dict[str, Tensor]:
        masked, plain = self._inner.result(), weighted_average(self._updates)
        draws = rng.generator(len(self._owner.differences), "nudge")
        for name, tensor in masked.items():
            if self._owner.nudge and tensor.is_floating_point():
                up = torch.rand(tensor.shape, generator=draws) < 0.5
                masked[name] = tensor + self._owner.nudge * (2.0 * up - 1.0)
        away = max(float((masked[name].double() - plain[name].double()).abs().max()) for name in plain)
        self._owner.differences.append(away)
        return masked


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "server"))
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--clients", type=int, nargs="+", default=[3])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--modes", nargs="*", default=list(MODES))
    parser.add_argument("--nudge", type=float, default=0.0)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=1.0, help="of the Dirichlet partition")
    parser.add_argument("--lock", action="store_true", help="masks over the key-lock")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dataset = data.load(options.data)
    torch.set_num_threads(1)
    for clients in options.clients:
        (accuracy if options.what == "accuracy" else server)(options, dataset, clients)


def accuracy(options: argparse.Namespace, dataset: Dataset, clients: int) -> None:
    """Masked and plain trainings, one after the other."""
    plain = trained(options, dataset, clients, PlainAggregation())
    about = {"data": options.data, "model": options.model, "clients": clients, "bits": options.bits}
    print(json.dumps(about | {"mode": "plain", "accuracy": plain["accuracy"]}), flush=True)
    others = [(mode, Compared(MaskedAggregation(mode=mode, bits=options.bits))) for mode in options.modes]
    if options.nudge:
        others.append(("plain, nudged", Compared(PlainAggregation(), nudge=options.nudge)))
    for mode, compared in others:
        found = trained(options, dataset, clients, compared)
        row = about | {
            "mode": mode,
            "accuracy": found["accuracy"],
            "largest_difference": max(compared.differences),
            "same_accuracies": found["accuracy"] == plain["accuracy"],
        }
        print(json.dumps(row), flush=True)


def federation(
    options: argparse.Namespace, dataset: Dataset, clients: int, aggregation: Aggregation
) -> Federation:
    """As the paper trains, but for fewer rounds."""
    defense: Defense = KeyLock() if options.lock else NoDefense()
    return Federation(
        network(options, dataset),
        defense=defense,
        dataset=dataset,
        training=FederatedTraining(
            clients=clients,
            rounds=options.rounds,
            partition=Dirichlet(alpha=options.alpha),
            local=LocalTraining(lr=0.05),
        ),
        seed=options.seed,
        execution=Execution(workers=1),
        aggregation=aggregation,
    )


def network(options: argparse.Namespace, dataset: Dataset) -> nn.Module:
    """The network that everybody starts from."""
    return models.build_model(
        options.model,
        channels=dataset.spec.shape[0],
        classes=dataset.spec.classes,
        seed=options.seed,
        initialization="default",
        normalization=(dataset.spec.mean, dataset.spec.std),
    )


def trained(
    options: argparse.Namespace, dataset: Dataset, clients: int, aggregation: Aggregation
) -> dict[str, Any]:
    """Accuracies by round."""
    results = list(federation(options, dataset, clients, aggregation).run())
    assert all(result.aggregated for result in results)
    return {"accuracy": [round(float(result.accuracy or 0), 4) for result in results]}


def server(options: argparse.Namespace, dataset: Dataset, clients: int) -> None:
    """What a server can build after a blind training, on labeled images that are not tested on."""
    seen: list[SeenUpload] = []
    members = federation(options, dataset, clients, MaskedAggregation(mode="blind"))
    list(members.run(on_seen=lambda plan, shown: seen.extend(shown), watched=[options.rounds - 1]))  # type: ignore[arg-type]
    order = torch.randperm(len(dataset.test_labels), generator=rng.generator(options.seed, "auxiliary"))
    own, test = order[: max(LABELED)], order[max(LABELED) :].sort().values
    tested = Subset(dataset.test_images, test), dataset.test_labels[test]
    images, labels = dataset.test_images[own].contiguous(), dataset.test_labels[own]
    about = {"data": options.data, "model": options.model, "clients": clients, "seed": options.seed}
    opened = network(options, dataset)
    opened.load_state_dict(members.server.state, strict=False)
    chance = float(torch.bincount(tested[1]).max() / len(test))
    print(
        json.dumps(about | {"members": share(evaluate(opened, *tested)), "chance": share(chance)}), flush=True
    )
    words = network(options, dataset)
    words.load_state_dict(readable(words, seen), strict=False)
    starts = {"the first model": network(options, dataset), "words taken for weights": words}
    scratch = models.build_model(
        options.model,
        channels=dataset.spec.shape[0],
        classes=dataset.spec.classes,
        seed=options.seed + 1,
        initialization="default",
        normalization=(dataset.spec.mean, dataset.spec.std),
    )
    for name, model in (starts | {"another first model (from scratch)": scratch}).items():
        row: dict[str, Any] = {"start": name, "as it is": share(evaluate(model, *tested))}
        for count in LABELED:
            fitted = fine_tuned(options, dataset, model, images[:count], labels[:count])
            row[f"{count} labels"] = share(evaluate(fitted, *tested))
        print(json.dumps(about | row), flush=True)


def readable(model: nn.Module, seen: list[SeenUpload]) -> dict[str, Tensor]:
    """The sum of the last words, taken for weights of the size of first ones, tensor by tensor."""
    first = model.state_dict()
    summed = {name: sum(upload.as_numbers()[name] for upload in seen) for name in seen[0].as_numbers()}
    return {
        name: (tensor - tensor.mean()) / tensor.std().clamp_min(1e-9) * first[name].std().nan_to_num(0.1)
        for name, tensor in summed.items()
    }


def fine_tuned(
    options: argparse.Namespace, dataset: Dataset, start: nn.Module, images: Tensor, labels: Tensor
) -> nn.Module:
    """A copy, trained on labeled images: Adam, whole sets up to 100 images, else batches of 100."""
    model = network(options, dataset)
    model.load_state_dict(start.state_dict())
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    draws = rng.generator(options.seed, "fine-tuning")
    for _ in range(STEPS):
        chosen = torch.randperm(len(labels), generator=draws)[:100]
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def share(value: float) -> float:
    """Rounded to four digits."""
    return round(float(value), 4)


if __name__ == "__main__":
    main()
