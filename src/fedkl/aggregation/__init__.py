"""How a server puts the updates of a round together.

base.py   what every aggregation does: offer, drop, result, what_the_server_sees
plain.py  the sample-weighted average of named tensors, in the clear
masked.py the same, of words that the server cannot read
"""

from fedkl.aggregation.base import (
    Aggregation,
    FederationPlan,
    OnSeen,
    RoundAggregation,
    RoundPlan,
    Seen,
    SeenUpdate,
    ServerLearns,
)
from fedkl.aggregation.masked import MaskedAggregation, SeenSum, SeenUpload
from fedkl.aggregation.plain import PlainAggregation, PlainRound, RunningAverage, weighted_average

AnyAggregation = PlainAggregation | MaskedAggregation
"""Those that a configuration can name."""

__all__ = [
    "Aggregation",
    "AnyAggregation",
    "FederationPlan",
    "MaskedAggregation",
    "OnSeen",
    "PlainAggregation",
    "PlainRound",
    "RoundAggregation",
    "RoundPlan",
    "RunningAverage",
    "Seen",
    "SeenSum",
    "SeenUpdate",
    "SeenUpload",
    "ServerLearns",
    "weighted_average",
]
