"""Claim (b): what is the global model worth to a server that has no client's lock, but is not naive?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int64
from torch import Tensor, nn

from fedkl.defenses import Defense
from fedkl.defenses.completion import Completion
from fedkl.federated.client import Client
from fedkl.locking import Split
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
        One result per arm and kind of statistics, of the refit one per 10, 100, 1000 and all of the auxiliary
        images; none where no parameter is private.
    """
    server = defense.prepare(model)
    server.load_public_state(state)
    filled = Completion(server.bake(), server)
    if not filled.affine:
        return []
    arms: dict[FillInArm, Completion] = {
        "neutral": filled.neutral(),
        "random-key": filled,
        "mean-affine": filled.averaged([_baked(client, split, state) for client in clients]),
    }
    results = [
        FillIn(arm=arm, statistics=kind, accuracy=evaluate(candidate, *test), auxiliary=used)
        for arm, variant in arms.items()
        for kind, candidate, used in variant.with_statistics(auxiliary[0])
    ]
    for count in sorted({*_REFITS, len(auxiliary[0])}):
        if count <= len(auxiliary[0]):
            images, labels = (each[:count] for each in auxiliary)
            refit = arms["neutral"].refitted(images, labels, steps=refit_steps)
            kind, candidate, _ = refit.with_statistics(images)[-1]
            score = evaluate(candidate, *test)
            results.append(FillIn(arm="refit", statistics=kind, accuracy=score, auxiliary=count))
    return results


_REFITS = (10, 100, 1000)


def _baked(client: Client, split: Split, state: NamedTensors) -> nn.Module:
    client.enter(split, state)
    return split.bake()
