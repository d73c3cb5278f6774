"""iDLG: DLG with the label read off the classifier's gradient first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedkl.attacks.base import Needs, register_attack
from fedkl.attacks.labels import infer_label
from fedkl.attacks.matching.dlg import DLG
from fedkl.protocol import Observation
from fedkl.types import Labels


@register_attack
@dataclass(frozen=True, kw_only=True)
class IDLG(DLG):
    """`DLG` with inferred labels (batch size 1 only); labels that were granted are not looked at.

    Source:
        Zhao et al. 2020.
    """

    title: ClassVar[str] = "iDLG"
    type: Literal["idlg"] = "idlg"  # type: ignore[assignment]

    @property
    def needs(self) -> Needs:
        """The sign of the classifier's gradient names the label of a single image."""
        return Needs(batch=1)

    def _labels(self, observations: list[Observation]) -> list[Labels] | None:
        return [infer_label(observation) for observation in observations]
