"""What does not go together in a federation, and what to do instead."""

from __future__ import annotations

import torch
from torch import nn

from fedkl.aggregation import Aggregation
from fedkl.errors import ConfigError
from fedkl.federated.options import FederatedTraining
from fedkl.federated.server import Averaging
from fedkl.locking import Split


def usable_device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        ConfigError: This machine has none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but PyTorch finds no GPU. Use device = 'cpu'.")
    return torch.device(name)


def check_fedsgd(split: Split, training: FederatedTraining) -> None:
    """Gradients carry no statistics.

    Raises:
        ConfigError: There are public ones that nobody would learn.
    """
    if training.local.algorithm == "fedavg":
        return
    sent, trained = split.public_state(), split.public_parameters()
    statistics = [name for name, t in sent.items() if name not in trained and t.is_floating_point()]
    if statistics:
        raise ConfigError(
            f"fedsgd sends gradients only, but '{statistics[0]}' is a public buffer that nobody would "
            "learn. Use algorithm='fedavg', or a defense that keeps norm statistics private."
        )


def check_tied(split: Split, training: FederatedTraining) -> None:
    """A weight under two names would be stepped under one of them and averaged under the other.

    Raises:
        ConfigError: There is one, and the server takes steps.
    """
    if isinstance(training.server_optimizer, Averaging):
        return
    named = split.public_parameters()
    tensors = split.model.state_dict(keep_vars=True)
    tied = [n for n, t in tensors.items() if isinstance(t, nn.Parameter) and n not in named]
    if tied:
        raise ConfigError(
            f"'{tied[0]}' is another name of a tied weight, which only server averaging of weights handles. "
            "Use training.server of type 'averaging' with algorithm='fedavg', or untie the weight."
        )


def check_server_knows(aggregation: Aggregation, training: FederatedTraining) -> None:
    """A server steps along what it can read; weights that it cannot are replaced as they are.

    Raises:
        ConfigError: It was to step along an average that it does not learn.
    """
    if aggregation.server_learns == "nothing" and not isinstance(training.server_optimizer, Averaging):
        raise ConfigError(
            f"aggregation '{aggregation.type}' shows the server no average that an optimizer could step "
            "along. Use training.server of type 'averaging' with algorithm='fedavg', or another aggregation."
        )
