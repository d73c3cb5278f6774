"""What running statistics that are sent along say of a client: its mode, its batches, its images' mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

_COUNT, _MEAN = "num_batches_tracked", "running_mean"


@dataclass(frozen=True, kw_only=True)
class RunningStatistics:
    """What became of running statistics during local training.

    Attributes:
        moved: Whether any of their values did.
        batches: How many were counted; None: no norm counts, or not all count the same.
        frozen: Whether some norm would not move them in any mode (momentum 0).
    """

    moved: bool
    batches: int | None
    frozen: bool


def running_statistics(
    network: nn.Module, sent: Mapping[str, Tensor], *, is_difference: bool
) -> RunningStatistics | None:
    """Compares running statistics that were sent with those of the base weights.

    Args:
        network: With the base weights.
        sent: By the network's names; those of a difference are differences.
        is_difference: Whether they are.

    Returns:
        What became of them; None: none were sent.
    """
    base = network.state_dict()
    changes = {
        name: tensor if is_difference else tensor.to(base[name].dtype) - base[name]
        for name, tensor in sent.items()
        if name.rpartition(".")[2] in (_COUNT, _MEAN)
    }
    means = [change for name, change in changes.items() if name.endswith(_MEAN)]
    if not means:
        return None
    counts = {int(change) for name, change in changes.items() if name.endswith(_COUNT)}
    return RunningStatistics(
        moved=any(bool(change.ne(0).any()) for change in means),
        batches=counts.pop() if len(counts) == 1 else None,
        frozen=any(getattr(module, "momentum", None) == 0 for module in network.modules()),
    )
