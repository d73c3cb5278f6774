"""How a server puts the updates of a round together.

plain.py  the sample-weighted average of named tensors
"""

from fedkl.aggregation.plain import RunningAverage, weighted_average

__all__ = ["RunningAverage", "weighted_average"]
