"""How a server puts the updates of a round together.

base.py   what every aggregation does: offer, drop, result, what_the_server_sees
plain.py  the sample-weighted average of named tensors, in the clear
"""

from fedkl.aggregation.base import (
    Aggregation,
    OnSeen,
    RoundAggregation,
    RoundPlan,
    Seen,
    SeenUpdate,
    ServerLearns,
)
from fedkl.aggregation.plain import PlainAggregation, PlainRound, RunningAverage, weighted_average

AnyAggregation = PlainAggregation
"""Those that a configuration can name."""

__all__ = [
    "Aggregation",
    "AnyAggregation",
    "OnSeen",
    "PlainAggregation",
    "PlainRound",
    "RoundAggregation",
    "RoundPlan",
    "RunningAverage",
    "Seen",
    "SeenUpdate",
    "ServerLearns",
    "weighted_average",
]
