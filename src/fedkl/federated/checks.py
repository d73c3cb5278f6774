"""What does not go together in a federation, and what to do instead."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.aggregation import Aggregation
from fedkl.errors import ConfigError, DataError, FedKLError, printable
from fedkl.federated.options import FederatedTraining
from fedkl.federated.server import Averaging
from fedkl.locking import Split, copied


def usable_device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        ConfigError: This machine has none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but PyTorch finds no GPU. Use device = 'cpu'.")
    return torch.device(name)


def check_called(model: nn.Module, images: Tensor, *, classes: int) -> None:
    """Calls a copy of a network with a few training images, as clients and evaluations do.

    Args:
        model: The plain architecture; not changed.
        images: At least two, for norms that need a batch.
        classes: How many the dataset has.

    Raises:
        DataError: It cannot be called with them, or returns no class scores.
    """
    probe = copied(model, subject="Federation", error=ConfigError)
    for training in (True, False):
        probe.train(training)
        scores = _called(probe, images)
        if (
            not isinstance(scores, Tensor)
            or not scores.is_floating_point()
            or scores.dim() != 2
            or len(scores) != len(images)
            or scores.shape[1] < classes
        ):
            got = f"a {type(scores).__name__}"
            if isinstance(scores, Tensor):
                got = f"{scores.dtype} of shape {tuple(scores.shape)}"
            raise DataError(
                "Federation: expected a network that returns class scores, floating-point numbers of shape "
                f"({len(images)}, {classes}) for {len(images)} images of {classes} classes, got {got} in "
                f"{'train' if training else 'eval'} mode. Return the scores, one for each class: wrap a "
                "network that returns more in a module whose forward takes them out, network(x).logits, say."
            )


def _scores(network: nn.Module, images: Tensor) -> object:
    """What it returns; what it draws, it draws from generators that are put back."""
    with rng.seeded(0, device=images.device), torch.no_grad():
        return network(images)


def _called(network: nn.Module, images: Tensor) -> object:
    """The same, or a DataError that says why not."""
    try:
        return _scores(network, images)
    except FedKLError:
        raise
    except Exception as error:
        raise DataError(
            f"Federation: the network cannot be called with images of shape {tuple(images.shape[1:])} and "
            f"{images.dtype} ({type(error).__name__}: {printable(str(error))}). "
            f"{_channels_remedy(network, images) or 'Give a network, on the CPU, that takes them so.'}"
        ) from error


def _channels_remedy(network: nn.Module, images: Tensor) -> str | None:
    """What to do where the network takes gray and the images are in color, or the reverse."""
    channels = images.shape[1]
    if channels not in (1, 3):
        return None
    other = images.expand(-1, 3, -1, -1) if channels == 1 else images.mean(1, keepdim=True)
    with suppress(Exception):  # it may be about something else
        _scores(network, other)
        return f"It takes images with channels={4 - channels}: load them so."
    return None


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
