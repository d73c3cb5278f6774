"""Gradients out of what plain SGD sends: one gradient, or weights after some steps."""

from __future__ import annotations

from torch import Tensor

from fedkl.errors import AttackError
from fedkl.protocol import Observation, Rescaling

ROUNDING = 2.0**-24
"""Largest relative error of a float32 number."""


def check_sgd(observation: Observation, *, attack: str) -> None:
    """Raises AttackError where an update is no weighted sum of gradients of the client's own images.

    Clipping changes the weights only, of whole updates or of each image.

    Args:
        observation: What the server has.
        attack: Who asks, for the message.
    """
    local = observation.local
    adaptive = local.algorithm == "fedavg" and local.optimizer != "sgd"
    if not observation.up_to_a_factor or adaptive or local.augmentation != "none":
        raise AttackError(
            f"{attack}: expected a gradient, or weights after steps of SGD, up to a factor, got a "
            "transformed update, another optimizer or augmented images. Use the attack learned."
        )


def sum_of_gradients(observation: Observation, name: str) -> Tensor:
    """The steps' gradients of a parameter, summed up to a factor that all parameters share; float64.

    Weight decay is taken out: exactly of one step, up to the steps' own change of the weights of several. Of
    an update that was rescaled it is not, as the factor is not known, and counts as an error (`rounding`).

    Args:
        observation: Of a client that trains with SGD.
        name: Of a parameter whose gradient was observed.
    """
    local, sent = observation.local, observation.gradient[name].detach().cpu().double()
    if local.algorithm != "fedavg" or not local.weight_decay or _rescaled(observation):
        return sent
    share = local.summed_share(observation.batch_size)
    return sent - share * local.weight_decay * _received(observation, name)


def rounding(observation: Observation, name: str) -> float:
    """Expected size of the errors in `sum_of_gradients` of a parameter, as a Frobenius norm.

    Weights lose what is below their last digit. Weight decay that was rescaled is there at most as a whole.
    """
    local, error = observation.local, ROUNDING * float(observation.gradient[name].detach().double().norm())
    if local.algorithm != "fedavg":
        return error
    left = local.summed_share(observation.batch_size) * local.weight_decay
    share = ROUNDING / local.lr + (left if _rescaled(observation) else 0.0)
    return error + share * float(_received(observation, name).norm())


def _received(observation: Observation, name: str) -> Tensor:
    return observation.model.get_parameter(name).detach().cpu().double()


def _rescaled(observation: Observation) -> bool:
    return isinstance(observation.transform, Rescaling)
