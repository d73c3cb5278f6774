"""What every attack that goes down a chain needs to have observed."""

from __future__ import annotations

import math

from fedkl.attacks.algebraic.blind import LARGEST
from fedkl.attacks.algebraic.chain import Chain, read_chain
from fedkl.errors import AttackError
from fedkl.protocol import Observation


def image_equations(observation: Observation) -> int:
    """Bytes of the normal equations for an image, their factor, and what they are summed from."""
    return 3 * 8 * math.prod(observation.image_shape) ** 2


def chain_of(observation: Observation, *, attack: str) -> Chain:
    """The observation's network as a chain.

    Args:
        observation: What the server has.
        attack: Who asks, for messages.

    Raises:
        AttackError: It is no chain.
    """
    return read_chain(
        observation.model,
        image_shape=observation.image_shape,
        train_mode=observation.train_mode,
        attack=attack,
    )


def open_chain(observation: Observation, *, attack: str, private_stem: bool = False) -> Chain:
    """The observation's network, checked to be one whose blocks can be gone down through.

    Args:
        observation: What the server has.
        attack: Who asks, for messages.
        private_stem: Whether the attack does without the first layer's gradient.

    Raises:
        AttackError: It is of a batch or of several steps, or the network is no chain, or it lacks a gradient.
    """
    if observation.batch_size != 1:
        raise AttackError(
            f"{attack}: expected the gradient of one image, got a batch of {observation.batch_size}: "
            "the head's input cannot be divided out then. Use another attack."
        )
    if observation.free:
        raise AttackError(
            f"{attack}: it looks for the secrets by itself; nothing may be free, got "
            f"{', '.join(observation.free)}. Leave out the arms that regress."
        )
    if not observation.local.is_gradient or not observation.up_to_a_factor:
        raise AttackError(
            f"{attack}: expected the gradient of one step, up to a factor, got several local steps, weights "
            "or a transformed update. Use another attack."
        )
    chain = chain_of(observation, attack=attack)
    name = chain.blocks[-1].layer.name
    head = {f"{name}.weight", f"{name}.bias"}
    needed = {f"{block.layer.name}.weight" for block in chain.blocks[int(private_stem) :]}
    missing = (head | needed).difference(observation.gradient)
    if chain.covered or (missing and missing <= head):
        missing = (missing - head) | _missing_below(chain, observation)
    if missing:
        raise AttackError(
            f"{attack}: expected the gradient of every layer's weight and of the head's bias or, without"
            " the head or behind a norm over its inputs, of a last convolution's weight and bias, without a "
            "norm and not too large; not "
            f"observed: {', '.join(sorted(missing))}. Use another attack."
        )
    return chain


def open_above_first(observation: Observation, *, attack: str, private_stem: bool = False) -> Chain:
    """Likewise, for attacks that treat the first block themselves: a convolution, with plain blocks above.

    Args:
        observation: What the server has.
        attack: Who asks, for messages.
        private_stem: Whether the attack does without the first layer's gradient.

    Raises:
        AttackError: As `open_chain`, or the network has norms or scales further up, or no block above the
            first convolution.
    """
    chain = open_chain(observation, attack=attack, private_stem=private_stem)
    first, *above = chain.blocks
    dressed = [block.layer.name for block in above if block.norm or block.elementwise]
    if dressed:
        raise AttackError(
            f"{attack}: expected norms and locks behind the first convolution only, got one behind "
            f"'{dressed[0]}'. Use another attack."
        )
    if not first.layer.is_convolution or (
        len(above) == 1
        and (
            chain.covered
            or not {f"{above[0].layer.name}.{part}" for part in ("weight", "bias")}.issubset(
                observation.gradient
            )
        )
    ):
        raise AttackError(
            f"{attack}: expected a network that starts with a convolution and has a public layer above, got "
            f"'{first.layer.name}' below nothing that was observed. Use another attack."
        )
    return chain


def _missing_below(chain: Chain, observation: Observation) -> set[str]:
    """What the blind top lacks, by name; nothing where it can start."""
    block = chain.blocks[-2] if len(chain.blocks) > 1 else chain.blocks[-1]
    size = math.prod(block.input_shape) + math.prod(block.output_shape)
    if not block.layer.is_convolution or block.norm or block.elementwise or size > LARGEST:
        return {f"{chain.blocks[-1].layer.name}.weight"}
    return {f"{block.layer.name}.bias"}.difference(observation.gradient)
