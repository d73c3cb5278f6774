"""Initial weights that several architectures share."""

from __future__ import annotations

from typing import Literal

from torch import nn


def kaiming_normal_(
    model: nn.Module,
    *,
    mode: Literal["fan_in", "fan_out"],
    kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,),
) -> None:
    """Draws weights from N(0, 2 / fan), in place; biases stay.

    Args:
        model: The model.
        mode: Whether fan counts what goes into an output (He et al. 2015, equation 10) or comes out of an
            input (equation 14, torchvision's choice).
        kinds: The modules whose ``weight`` is drawn.

    Source:
        He et al. 2015, "Delving Deep into Rectifiers" (arXiv 1502.01852), section 2.2.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
