"""Real photographs for the metrics' tests: crops of the picture that travels inside scikit-image."""

from __future__ import annotations

import pytest
import skimage.data
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """Six different gray crops of one photograph, (6, 1, 32, 32), in [0, 1]."""
    camera = torch.from_numpy(skimage.data.camera().copy()).double() / 255
    corners = [(60, 200), (100, 220), (200, 150), (300, 300), (400, 60), (250, 400)]
    return torch.stack([camera[top : top + 32, left : left + 32] for top, left in corners]).unsqueeze(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)
