"""Claim (b): what is the global model worth to a server that has no client's lock, but is not naive?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.defenses import Defense
from fedkl.defenses.base import plain_copy
from fedkl.federated.client import Client
from fedkl.locking import Split
from fedkl.metrics import evaluate
from fedkl.types import Images, Labels, NamedTensors


@dataclass(frozen=True, kw_only=True)
class FillIn:
    """One way in which the server completes the model.

    Attributes:
        arm: ``"neutral"`` (γ = 1, β = 0), ``"random-key"`` (a random key with random lock layers),
            ``"mean-affine"`` (γ, β averaged over the clients: an oracle, the server cannot have it) or
            ``"refit"`` (γ, β fitted to labeled auxiliary images).
        statistics: ``"initial"`` (mean 0, variance 1: the server never saw any) or ``"re-estimated"`` (from
            the auxiliary images, no labels needed).
        accuracy: Test accuracy in [0, 1].
        auxiliary: Number of auxiliary images used.
    """

    arm: str
    statistics: str
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
    test: tuple[Float[Tensor, "test channels height width"], Int64[Tensor, " test"]],
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
    """
    images, labels = auxiliary
    random_key = defense.prepare(model)
    random_key.load_public_state(state)
    filled = plain_copy(random_key)
    norms = [m for m in filled.modules() if isinstance(getattr(m, "weight", None), Tensor) and _is_norm(m)]
    arms = {"random-key": copy.deepcopy(filled), "mean-affine": _mean_affine(split, state, clients)}
    for norm in norms:
        norm.reset_parameters()  # type: ignore[operator]
    arms["neutral"] = filled
    arms["refit"] = _refit(filled, images, labels, steps=refit_steps)
    results = []
    for arm in ("neutral", "random-key", "mean-affine", "refit"):
        variants = _with_statistics(arms[arm], images) if arm != "refit" else [("re-estimated", arms[arm])]
        for statistics, candidate in variants:
            score = evaluate(candidate, *test)
            used = 0 if statistics == "initial" else len(images)
            results.append(FillIn(arm=arm, statistics=statistics, accuracy=score, auxiliary=used))
    return results


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "reset_parameters") and "Norm" in type(module).__name__


def _mean_affine(split: Split, state: NamedTensors, clients: Sequence[Client]) -> nn.Module:
    baked = []
    for client in clients:
        client.enter(split, state)
        baked.append(plain_copy(split))
    mean = baked[0]
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([dict(b.named_parameters())[name] for b in baked]).mean(0))
    _reset_statistics(mean)
    return mean


def _reset_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()


def _with_statistics(model: nn.Module, images: Images) -> Iterator[tuple[str, nn.Module]]:
    _reset_statistics(model)
    yield "initial", model
    if any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules()):
        estimated = copy.deepcopy(model)
        _estimate_statistics(estimated, images)
        yield "re-estimated", estimated


def _estimate_statistics(model: nn.Module, images: Images) -> None:
    """Running statistics of exactly these images, as one batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
            module.momentum = None  # a cumulative average
    with torch.no_grad():
        model.train()(images)
    model.eval()


def _refit(model: nn.Module, images: Images, labels: Labels, *, steps: int) -> nn.Module:
    """γ and β of every norm fitted on the auxiliary images; all public tensors stay."""
    fitted = copy.deepcopy(model)
    affine = [p for m in fitted.modules() if _is_norm(m) for p in m.parameters(recurse=False)]
    if affine:
        optimizer = torch.optim.Adam(affine, lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(fitted.train()(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    _estimate_statistics(fitted, images)
    return fitted
