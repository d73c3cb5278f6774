"""How a server completes the global model where clients keep γ, β and statistics to themselves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.locking import Split
from fedkl.norms import norm_tensors, statistics_names


class Completion:
    """A plain model of the server's, and which of its tensors the server has to fill in.

    Attributes:
        model: The model; its methods' results have one of their own.
        affine: Names of the private parameters: γ and β, or those of whole private layers.
        norms: The norms whose statistics are private.
    """

    def __init__(self, model: nn.Module, server: Split) -> None:
        """Takes a plain model and the split that says what of it clients send."""
        public = set(server.public_parameters())
        sent = set(server.public_state())
        self.model = model
        self.affine = [name for name, _ in model.named_parameters() if name not in public]
        self.norms = [
            name
            for name, module in model.named_modules()
            if any(f"{name}.{statistic}".lstrip(".") not in sent for statistic in statistics_names(module))
        ]

    def _copy(self) -> Completion:
        return copy.deepcopy(self)

    def neutral(self, *, start: nn.Module | None = None) -> Completion:
        """γ = 1 and β = 0 where they are private; other private parameters stay as the server drew them.

        Args:
            start: The network that clients were given: where the server's γ and β are those of it, clients
                start there, and the server knows them; None: it knows none.
        """
        result = self._copy()
        given = {} if start is None else dict(start.named_parameters())
        with torch.no_grad():
            for name in self.affine:
                if name in given and torch.allclose(result.model.get_parameter(name), given[name], rtol=1e-3):
                    continue
                owner, _, tensor_name = name.rpartition(".")
                names = norm_tensors(result.model.get_submodule(owner))
                if names is not None:
                    result.model.get_parameter(name).fill_(1.0 if tensor_name == names.scale else 0.0)
        return result

    def averaged(self, baked: Sequence[nn.Module]) -> Completion:
        """The clients' mean γ and β where they are private."""
        result = self._copy()
        with torch.no_grad():
            for name in self.affine:
                mean = torch.stack([model.get_parameter(name) for model in baked]).mean(0)
                result.model.get_parameter(name).copy_(mean)
        return result

    def refitted(self, images: Tensor, labels: Tensor, *, steps: int) -> Completion:
        """Private γ and β fitted on labeled images; everything public stays."""
        result = self._copy()
        result._batch_statistics()
        affine = [result.model.get_parameter(name) for name in self.affine]
        optimizer = torch.optim.Adam(affine, lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(result.model(images), labels).backward(inputs=affine)  # type: ignore[no-untyped-call]
            optimizer.step()
        return result

    def with_statistics(
        self, images: Tensor
    ) -> list[tuple[Literal["initial", "re-estimated", "public"], nn.Module, int]]:
        """The model with initial and with re-estimated statistics, and how many images that took."""
        if not self.norms:
            return [("public", self.model, 0)]
        initial, estimated = self._copy(), self._copy()
        for filled in (initial, estimated):
            filled._reset_statistics()
        estimated._batch_statistics()
        with torch.no_grad():
            estimated.model(images)
        return [("initial", initial.model, 0), ("re-estimated", estimated.model, len(images))]

    def _private_norms(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.norms]

    def _reset_statistics(self) -> None:
        for norm in self._private_norms():
            if isinstance(norm, nn.modules.batchnorm._NormBase):
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average: of exactly the images that follow

    def _batch_statistics(self) -> None:
        """Norms with private statistics normalize by the batch and follow it; all others stay as they are."""
        self.model.eval()
        for norm in self._private_norms():
            norm.train()
