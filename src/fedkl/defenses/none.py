"""No defense: everything is public, norm statistics included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedkl.defenses.base import Defense


@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """Plain federated learning."""

    type: Literal["none"] = "none"
