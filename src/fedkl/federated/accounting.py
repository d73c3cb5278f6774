"""The ledger of a federation whose defense gives every client a guarantee."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedkl.defenses import DEFENSES, Defense
from fedkl.errors import ConfigError
from fedkl.federated.client import Client
from fedkl.federated.options import FederatedTraining
from fedkl.privacy import Ledger
from fedkl.protocol.private_gradient import check_separate


def ledger_of(
    clients: Sequence[Client], *, defense: Defense, training: FederatedTraining, model: nn.Module
) -> Ledger | None:
    """What the clients spend is counted here; None of defenses that give no guarantee.

    Args:
        clients: All.
        defense: What every client does.
        training: How it trains.
        model: A client's; it is put into train mode where gradients are taken of each image.

    Raises:
        ConfigError: There is a budget, and nothing that could be counted.
        TrainingError: Gradients of each image cannot be taken of this model.
    """
    procedure = defense.procedure(training.local)
    if procedure.per_example is not None:
        model.train()
        check_separate(model)
    costs = {client.name: defense.privacy(procedure, samples=client.num_samples) for client in clients}
    guaranteed = {name: cost for name, cost in costs.items() if cost is not None}
    if len(guaranteed) == len(costs):
        return Ledger(guaranteed, options=training.privacy)
    if training.privacy.budget is not None:
        offered = [each for kind in DEFENSES for each in kind.variants()]
        others = [each.type for each in offered if each.privacy(each.procedure(procedure), samples=1)]
        raise ConfigError(
            f"privacy.budget: {defense.describe()} gives no guarantee that could be counted. Leave "
            f"the budget out, or use a defense with noise that gives one: {', '.join(others)}."
        )
    return None
