"""The generator of BigGAN-deep, which GGL searches on ILSVRC2012; biggan_files.py reads its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl.errors import ConfigError, gathered
from fedkl.types import ImageBatch, Labels

_TOGETHER = 8  # images drawn at once: at 256×256, each takes some 100 MB on its way
_FIRST = 16  # channels of the first map, in units of the width
_REMEDY = "Give the config.json that belongs to the weights."


@dataclass(frozen=True, kw_only=True)
class BigGANConfig:
    """The sizes of a BigGAN-deep, under the names of its config.json.

    Attributes:
        output_dim: Height and width of its images.
        z_dim: Length of the latent vector, and of the embedding of a class.
        channel_width: Unit of the numbers of channels.
        num_classes: Number of classes.
        layers: For each block: whether it doubles height and width, its channels before and behind.
        attention_layer_position: The block before which attention stands.
        eps: Of the norms and of spectral normalization.
        n_stats: For how many truncations, evenly from 0 to 1, the norms have statistics.

    Raises:
        ConfigError: These are no sizes of a BigGAN-deep.
    """

    output_dim: int
    z_dim: int
    channel_width: int
    num_classes: int
    layers: tuple[tuple[bool, int, int], ...]
    attention_layer_position: int
    eps: float
    n_stats: int

    def __post_init__(self) -> None:
        least = {
            "z_dim": 1,
            "channel_width": 3,
            "num_classes": 1,
            "attention_layer_position": 0,
            "n_stats": 2,
        }
        values = {name: getattr(self, name) for name in least}
        problems = [
            f"{name}: expected a whole number ≥ {least[name]}, got {value!r}"
            for name, value in values.items()
            if type(value) is not int or value < least[name]
        ]
        if not isinstance(self.eps, float) or not 0 < self.eps < 1:
            problems.append(f"eps: expected a number between 0 and 1, got {self.eps!r}")
        problems += self._problems_of_layers()
        if problems:
            raise ConfigError(gathered("These are no sizes of a BigGAN-deep.", problems, _REMEDY))

    def _problems_of_layers(self) -> list[str]:
        channels, side = _FIRST, 4
        for place, layer in enumerate(self.layers):
            match layer:
                case (bool(doubles), int(before), int(behind)) if before == channels and behind > 0:
                    if behind not in (before, before // 2):
                        return [f"layers[{place}]: expected {before} or half as many channels, got {behind}"]
                    channels, side = behind, side * (1 + doubles)
                case _:
                    return [f"layers[{place}]: expected [true or false, {channels}, channels], got {layer!r}"]
        problems = [] if channels == 1 else [f"layers: expected 1 channel at the end, got {channels}"]
        if side != self.output_dim:
            problems.append(f"output_dim: the layers lead to {side} pixels, got {self.output_dim!r}")
        return problems


class BigGANDeep(nn.Module):
    """Draws images from a latent vector and a class, for one truncation; spectral norms are folded in.

    Names of its tensors are those of pytorch-pretrained-biggan. It is for drawing only: the norms have the
    statistics of the weights' own training.

    Args:
        config: Its sizes.

    Shapes:
        Latent vectors ``(batch, z_dim)``, in training from N(0, I) cut off at ±2 · truncation; labels
        ``(batch,)``; images ``(batch, 3, output_dim, output_dim)`` in [0, 1].

    Source:
        Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", appendix B
        (BigGAN-deep); layout and names of pytorch-pretrained-biggan 0.1.1. Only the three output
        channels that are used are computed.
    """

    def __init__(self, config: BigGANConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Linear(config.num_classes, config.z_dim, bias=False)
        self.generator = _Layers(config)

    @property
    def latent(self) -> int:
        """Length of the latent vector."""
        return self.config.z_dim

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.config.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return 3, self.config.output_dim, self.config.output_dim

    def forward(self, z: Float[Tensor, "batch latent"], labels: Labels) -> ImageBatch:
        """Images in [0, 1] for latent vectors and classes."""
        conditions = torch.cat([z, self.embeddings.weight.T[labels]], dim=1)
        images: list[Tensor] = [self.generator(part) for part in torch.split(conditions, _TOGETHER)]
        return (torch.cat(images) + 1) / 2

    def fits(self, image_shape: tuple[int, int, int], classes: int) -> bool:
        """Whether it can stand for such images: square colored ones, of its size or smaller."""
        channels, height, width = image_shape
        return channels == 3 and height == width <= self.config.output_dim and classes == self.classes


class _Layers(nn.Module):
    def __init__(self, config: BigGANConfig) -> None:
        super().__init__()
        width, eps, condition = config.channel_width, config.eps, 2 * config.z_dim
        blocks: list[nn.Module] = [
            _Block(width * before, width * behind, condition=condition, doubles=doubles, eps=eps)
            for doubles, before, behind in config.layers
        ]
        place = config.attention_layer_position
        if place < len(blocks):
            blocks.insert(place, _Attention(width * config.layers[place][1]))
        self.gen_z = nn.Linear(condition, 4 * 4 * _FIRST * width)
        self.layers = nn.ModuleList(blocks)
        self.bn = nn.BatchNorm2d(width, eps=eps)
        self.conv_to_rgb = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, condition: Float[Tensor, "batch condition"]) -> ImageBatch:
        x = self.gen_z(condition).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # channels come last there
        for layer in self.layers:
            x = layer(x, condition)
        images: Tensor = self.conv_to_rgb(self.bn(x).relu()).tanh()
        return images


class _Block(nn.Module):
    """A residual bottleneck; where it halves the channels, the shortcut keeps the first ones."""

    def __init__(self, inputs: int, outputs: int, *, condition: int, doubles: bool, eps: float) -> None:
        super().__init__()
        middle = inputs // 4
        self.bn_0 = _ConditionalNorm(inputs, condition=condition, eps=eps)
        self.conv_0 = nn.Conv2d(inputs, middle, 1)
        self.bn_1 = _ConditionalNorm(middle, condition=condition, eps=eps)
        self.conv_1 = nn.Conv2d(middle, middle, 3, padding=1)
        self.bn_2 = _ConditionalNorm(middle, condition=condition, eps=eps)
        self.conv_2 = nn.Conv2d(middle, middle, 3, padding=1)
        self.bn_3 = _ConditionalNorm(middle, condition=condition, eps=eps)
        self.conv_3 = nn.Conv2d(middle, outputs, 1)
        self._outputs = outputs
        self._resize = nn.Upsample(scale_factor=2.0) if doubles else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch c h w"], condition: Float[Tensor, "batch condition"]
    ) -> Float[Tensor, "batch d k l"]:
        found = self.conv_0(self.bn_0(x, condition).relu())
        found = self.conv_1(self._resize(self.bn_1(found, condition).relu()))
        found = self.conv_2(self.bn_2(found, condition).relu())
        found = self.conv_3(self.bn_3(found, condition).relu())
        added: Tensor = found + self._resize(x[:, : self._outputs])
        return added


class _ConditionalNorm(nn.Module):
    """Batch norm with fixed statistics, and a scale and offset that are linear in the condition."""

    def __init__(self, channels: int, *, condition: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Linear(condition, channels, bias=False)
        self.offset = nn.Linear(condition, channels, bias=False)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(
        self, x: Float[Tensor, "batch c h w"], condition: Float[Tensor, "batch condition"]
    ) -> Float[Tensor, "batch c h w"]:
        x = F.batch_norm(x, self.get_buffer("running_mean"), self.get_buffer("running_var"), eps=self.eps)
        scale, offset = 1 + self.scale(condition), self.offset(condition)
        normalized: Tensor = x * scale[:, :, None, None] + offset[:, :, None, None]
        return normalized


class _Attention(nn.Module):
    """Self-attention over positions, with keys and values of half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.snconv1x1_theta = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.snconv1x1_phi = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.snconv1x1_g = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.snconv1x1_o_conv = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "batch c h w"], _: Tensor) -> Float[Tensor, "batch c h w"]:
        queries = self.snconv1x1_theta(x).flatten(2)
        keys = F.max_pool2d(self.snconv1x1_phi(x), 2).flatten(2)
        values = F.max_pool2d(self.snconv1x1_g(x), 2).flatten(2)
        attention = (queries.mT @ keys).softmax(-1)
        found = (values @ attention.mT).unflatten(2, x.shape[2:])
        added: Tensor = x + self.gamma * self.snconv1x1_o_conv(found)
        return added
