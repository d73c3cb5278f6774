"""A small vision transformer for 32×32 images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkl.errors import ConfigError
from fedkl.models.checks import check_image_size

Tokens = Float[Tensor, "batch tokens features"]


class Embedding(nn.Module):
    """One token for every patch, a class token before them, and learned positions added to all.

    Shape ``(batch, channels, size, size)`` to ``(batch, (size / patch)² + 1, features)``.
    """

    def __init__(self, *, channels: int, image_size: int, patch: int, features: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, features, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, features))
        self.positions = nn.Parameter(torch.empty(1, (image_size // patch) ** 2 + 1, features))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Tokens:
        """The tokens of images in [0, 1]."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], 1) + self.positions


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v for every head, then a linear layer.

    It is written out because PyTorch's fused attention cannot be differentiated twice, which every
    gradient-inversion attack does.
    """

    def __init__(self, features: int, *, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.projection = nn.Linear(features, features)

    def forward(self, x: Tokens) -> Tokens:
        """What every token takes from all tokens."""
        q, k, v = self.qkv(x).unflatten(2, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(3)
        mixed: Tensor = self.projection((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and added to its input."""

    def __init__(self, features: int, *, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, eps=1e-6)
        self.attention = Attention(features, heads=heads)
        self.norm2 = nn.LayerNorm(features, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )

    def forward(self, x: Tokens) -> Tokens:
        """Tokens for the next block."""
        x = x + self.attention(self.norm1(x))
        changed: Tensor = x + self.mlp(self.norm2(x))
        return changed


class ViT(nn.Module):
    """Patches as tokens, blocks of attention, and a linear layer on the class token.

    The defaults are DeiT-Tiny's width and heads with 4×4 patches of 32×32 images and half its depth.

    Args:
        channels: Channels of the images.
        classes: Number of classes.
        image_size: Height and width of the images; a multiple of `patch`.
        patch: Height and width of a patch.
        features: Of a token; a multiple of `heads`.
        depth: Number of blocks.
        heads: Of each block's attention.

    Raises:
        ConfigError: The sizes do not divide.

    Source:
        Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.1; Touvron et al. 2021 (arXiv 2012.12877) for
        DeiT-Tiny and its initialization, N(0, 0.02²) truncated at ±2. Deviation: no dropout and no stochastic
        depth, so that an update is a function of images and weights alone.

    >>> sum(p.numel() for p in ViT(channels=3, classes=10).parameters())
    2693578
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        image_size: int = 32,
        patch: int = 4,
        features: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        if image_size % patch or features % heads:
            raise ConfigError(
                "ViT: expected image_size a multiple of patch and features one of heads, got "
                f"{image_size} and {patch}, {features} and {heads}."
            )
        self._image_size = image_size
        self.embedding = Embedding(channels=channels, image_size=image_size, patch=patch, features=features)
        self.blocks = nn.Sequential(*(Block(features, heads=heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.head = nn.Linear(features, classes)
        self._initialize()

    def _initialize(self) -> None:
        nn.init.trunc_normal_(self.embedding.class_token, std=0.02)
        nn.init.trunc_normal_(self.embedding.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits for images in [0, 1].

        Raises:
            DataError: The images are of another size.
        """
        check_image_size(x, self._image_size, model=type(self).__name__)
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(x)))[:, 0])
        return logits
