"""Claim (b): what is the global model worth to a server that has no client's lock, but is not naive?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.defenses import Defense
from fedkl.defenses.base import plain_copy
from fedkl.federated.client import Client
from fedkl.locking import Split
from fedkl.locking.norms import norm_tensors, statistics_names
from fedkl.metrics import evaluate
from fedkl.types import Images, NamedTensors

FillInArm = Literal["neutral", "random-key", "mean-affine", "refit"]


@dataclass(frozen=True, kw_only=True)
class FillIn:
    """One way in which the server completes the model; what is public stays as it is.

    Attributes:
        arm: ``"neutral"`` (γ = 1, β = 0), ``"random-key"`` (a random key with random lock layers),
            ``"mean-affine"`` (γ, β averaged over the clients: an oracle, the server cannot have it) or
            ``"refit"`` (γ, β fitted to labeled auxiliary images).
        statistics: Those that are private: ``"initial"`` (mean 0, variance 1: the server never saw any) or
            ``"re-estimated"`` (from the auxiliary images, no labels needed). Where none are private:
            ``"public"``.
        accuracy: Test accuracy in [0, 1].
        auxiliary: Number of auxiliary images used.
    """

    arm: FillInArm
    statistics: Literal["initial", "re-estimated", "public"]
    accuracy: float
    auxiliary: int


def server_fill_ins(
    *,
    defense: Defense,
    model: nn.Module,
    state: NamedTensors,
    split: Split,
    clients: Sequence[Client],
    auxiliary: tuple[Float[Tensor, "auxiliary channels height width"], Int64[Tensor, " auxiliary"]],
    test: tuple[Images, Int64[Tensor, " test"]],
    refit_steps: int = 200,
) -> list[FillIn]:
    """Accuracy of the server's own model under every fill-in for what the clients keep private.

    A published implementation sets γ = β = 0 here, with which any model fails; that says nothing.

    Args:
        defense: The clients' defense.
        model: The plain architecture.
        state: The public global state.
        split: The shared model instance, to read the clients' γ and β for the oracle arm.
        clients: The clients, for the oracle arm.
        auxiliary: Images and labels of the same kind that the server owns; none of the clients' data.
        test: Images and labels to measure on.
        refit_steps: Adam steps (lr 0.05) of the refit.

    Returns:
        One result per arm and kind of statistics; none where no parameter is private.
    """
    server = defense.prepare(model)
    server.load_public_state(state)
    filled = _Filled(plain_copy(server), server)
    if not filled.affine:
        return []
    arms: dict[FillInArm, _Filled] = {
        "neutral": filled.neutral(),
        "random-key": filled,
        "mean-affine": filled.averaged([_baked(client, split, state) for client in clients]),
    }
    results = [
        FillIn(arm=arm, statistics=kind, accuracy=evaluate(candidate, *test), auxiliary=used)
        for arm, variant in arms.items()
        for kind, candidate, used in variant.with_statistics(auxiliary[0])
    ]
    refit = arms["neutral"].refitted(*auxiliary, steps=refit_steps)
    kind, candidate, _ = refit.with_statistics(auxiliary[0])[-1]
    score = evaluate(candidate, *test)
    return [*results, FillIn(arm="refit", statistics=kind, accuracy=score, auxiliary=len(auxiliary[0]))]


def _baked(client: Client, split: Split, state: NamedTensors) -> nn.Module:
    client.enter(split, state)
    return plain_copy(split)


class _Filled:
    """A plain model of the server's, and which of its tensors the server had to fill in.

    Attributes:
        affine: Names of the private γ and β.
        norms: The norms whose statistics are private.
    """

    def __init__(self, model: nn.Module, server: Split) -> None:
        public = set(server.public_parameters())
        sent = set(server.public_state())
        self.model = model
        self.affine = [name for name, _ in model.named_parameters() if name not in public]
        self.norms = [
            name
            for name, module in model.named_modules()
            if any(f"{name}.{statistic}".lstrip(".") not in sent for statistic in statistics_names(module))
        ]

    def _copy(self) -> _Filled:
        return copy.deepcopy(self)

    def neutral(self) -> _Filled:
        """γ = 1 and β = 0 where they are private."""
        result = self._copy()
        with torch.no_grad():
            for name in self.affine:
                owner, _, tensor_name = name.rpartition(".")
                names = norm_tensors(result.model.get_submodule(owner))
                is_scale = names is not None and tensor_name == names.scale
                result.model.get_parameter(name).fill_(1.0 if is_scale else 0.0)
        return result

    def averaged(self, baked: Sequence[nn.Module]) -> _Filled:
        """The clients' mean γ and β where they are private."""
        result = self._copy()
        with torch.no_grad():
            for name in self.affine:
                mean = torch.stack([model.get_parameter(name) for model in baked]).mean(0)
                result.model.get_parameter(name).copy_(mean)
        return result

    def refitted(self, images: Tensor, labels: Tensor, *, steps: int) -> _Filled:
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
