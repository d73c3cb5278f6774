"""iDLG: DLG with the label read off the classifier's gradient first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedkl.attacks.labels import infer_label
from fedkl.attacks.matching.dlg import DLG
from fedkl.protocol import Observation
from fedkl.types import Labels


@dataclass(frozen=True, kw_only=True)
class IDLG(DLG):
    """`DLG` with inferred labels (batch size 1 only); labels that were granted are not looked at.

    Source:
        Zhao et al. 2020.
    """

    type: Literal["idlg"] = "idlg"  # type: ignore[assignment]

    def _labels(self, observations: list[Observation]) -> list[Labels] | None:
        return [infer_label(observation) for observation in observations]
