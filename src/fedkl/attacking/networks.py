"""Networks of many observations, whose equal tensors are held once."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from fedkl.defenses import Defense

_FEW = 8


class Networks:
    """Gives the same tensors, and where all of them are the same the same model, to equal networks.

    Trials of one public network differ in what the server draws for itself at most; without this, each would
    hold all of the network. What it gives is to be read only: attacks change copies.
    """

    def __init__(self) -> None:
        self._tensors: dict[Hashable, list[Tensor]] = {}
        self._models: dict[Hashable, nn.Module] = {}
        self._origins: dict[int, nn.Module] = {}  # kept, so that no id is used twice

    def shared(self, model: nn.Module, *, of: nn.Module, defense: Defense) -> nn.Module:
        """The model, or an equal one of before; its tensors are replaced in place.

        Args:
            model: As the server built it; nobody else has it.
            of: The plain network that it was built from.
            defense: How: models of one network and one defense differ in their tensors only.
        """
        self._origins[id(of)] = of
        tensors = []
        for owner, module in model.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    one = self._held(f"{owner}.{name}", tensor)
                    if one is not tensor:
                        setattr(module, name, one)
                    tensors.append(id(one))
        modes = tuple(module.training for module in model.modules())
        return self._models.setdefault((id(of), defense, modes, tuple(tensors)), model)

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        """An equal tensor of this name, to the last bit; the tensor itself if there was none."""
        bits = _bits(tensor)
        kind = (
            type(tensor),
            tensor.requires_grad,
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.device,
        )
        # The first numbers tell drawn tensors apart without a look at the rest.
        held = self._tensors.setdefault(
            (name, kind, tuple(bits[: _FEW * tensor.element_size()].tolist())), []
        )
        for one in held:
            if torch.equal(_bits(one), bits):
                return one
        held.append(tensor)
        return tensor


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
