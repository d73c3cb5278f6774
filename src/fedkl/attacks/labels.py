"""Labels from gradients."""

from __future__ import annotations

import torch
from torch import nn

from fedkl.attacks.base import Observation
from fedkl.errors import AttackError
from fedkl.types import Labels


def infer_label(observation: Observation) -> Labels:
    """The label of a single image, from the sign of the classifier's gradient.

    With cross-entropy the gradient of the last bias is p − y: negative for the true class only. Without a
    bias, the row sums of the last weight's gradient serve where the classifier's inputs are positive.

    Returns:
        Shape ``(1,)``.

    Raises:
        AttackError: More than one image stands behind the gradient, or the classifier's gradient was not
            observed.

    Source:
        Zhao et al. 2020 (iDLG), section 3.1.
    """
    if observation.batch_size != 1:
        raise AttackError(f"Label inference works for one image, got a batch of {observation.batch_size}.")
    heads = [name for name, m in observation.model.named_modules() if isinstance(m, nn.Linear)]
    weight, bias = (f"{heads[-1]}.{part}" if heads else "" for part in ("weight", "bias"))
    if bias in observation.gradient:
        evidence = observation.gradient[bias]
    elif weight in observation.gradient:
        evidence = observation.gradient[weight].sum(1)
    else:
        raise AttackError("Label inference needs the gradient of the last linear layer; it was not observed.")
    return torch.argmin(evidence, dim=0, keepdim=True)
