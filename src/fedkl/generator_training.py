"""Trains the generators that GGL searches, on training images only, and shows what they draw."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fedkl import data, rng
from fedkl.attacks.generators.files import (
    IMAGE_SIDE,
    ConditionalGenerator,
    GeneratorInfo,
    ImageGenerator,
    load_generator,
    save_generator,
)
from fedkl.data import Dataset
from fedkl.errors import ConfigError
from fedkl.files import write_atomically
from fedkl.types import ImageBatch, Images, Labels

__all__ = [
    "GeneratorTraining",
    "held_out_psnr",
    "latent_psnr",
    "load_generator",
    "save_generator",
    "train",
    "write_samples",
]

HELD_OUT = 64
"""Test images that tell how near a generator can come to images it has not seen."""

Progress = Callable[[int, int, str], None]
"""(batches so far, batches in all, note)"""


@dataclass(frozen=True, kw_only=True)
class GeneratorTraining:
    """How a generator is trained: as the decoder of a class-conditional variational autoencoder.

    The loss of an image is ‖x − x̂‖² / (2 · noise²) + KL(q(z | x, y) ‖ N(0, I)); Adam, with a learning rate
    that rises shortly and falls by a cosine.

    Attributes:
        data: Dataset name.
        data_root: Folder of the datasets; `fedkl.data.default_root()` if None.
        epochs: Passes over the training images.
        seed: Of weights, order and noise.
        latent: Length of the latent vector.
        width: Width of the generator, see `GeneratorInfo`.
        noise: Standard deviation of a pixel. Smaller: nearer reconstructions, less orderly samples.
        batch_size: Images of a step.
        lr: Highest learning rate.

    Source:
        Kingma and Welling 2014; Sohn et al. 2015 (conditional). Deviation from GGL (Li et al. 2022), which
        searches GANs: an autoencoder trains steadily in minutes on one core, where a GAN does not, and its
        latent space covers every training image, so the nearest image to an unseen one is nearer. It is
        blurred; a reconstruction is judged by its distance to the truth, which blur hurts least.

    Raises:
        ConfigError: A number is out of its range.
    """

    data: str
    data_root: str | None = None
    epochs: int = 10
    seed: int = 0
    latent: int = 64
    width: int = 96
    noise: float = 0.15
    batch_size: int = 128
    lr: float = 2e-3

    def __post_init__(self) -> None:
        positive = {"noise": self.noise, "lr": self.lr}
        whole = {"epochs": self.epochs, "latent": self.latent, "width": self.width}
        problems = [f"{name}={value}" for name, value in whole.items() if value < 1]
        problems += [f"{name}={value}" for name, value in positive.items() if not 0 < value < math.inf]
        problems += [f"batch_size={self.batch_size}"] if self.batch_size < 2 else []
        if problems:
            raise ConfigError(f"GeneratorTraining: expected numbers above 0 (a batch ≥ 2), got {problems}.")

    @property
    def command(self) -> str:
        """The command line that repeats it, but for the place of the data."""
        return (
            f"fedkl generator train --data {self.data} --epochs {self.epochs} --seed {self.seed} "
            f"--latent {self.latent} --noise {self.noise}"
        )


def train(options: GeneratorTraining, *, progress: Progress | None = None) -> ConditionalGenerator:
    """Trains a generator on a dataset's training images.

    Args:
        options: How.
        progress: Called after every step.

    Returns:
        In evaluation mode, without gradients of its weights.

    Raises:
        DataError: The dataset cannot be had, or its images are not 32×32.
    """
    dataset = _dataset(options)
    images, labels = dataset.train_images, dataset.train_labels
    info = _info(options, dataset)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.manual_seed(options.seed)
        generator, encoder = ConditionalGenerator(info), _Encoder(info)
    parameters = [*generator.parameters(), *encoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=options.lr)
    steps = options.epochs * math.ceil(len(images) / options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    noise = rng.generator(options.seed, "generator", "noise")
    for step, batch in enumerate(_batches(len(images), options), start=1):
        x, y = images[batch][:, : info.channels], labels[batch]
        error, divergence = _elbo_terms(generator, encoder, x, y, noise)
        optimizer.zero_grad()
        torch.autograd.backward(error / (2 * options.noise**2) + divergence)
        optimizer.step()
        schedule.step()
        if progress:
            psnr = -10 * math.log10(error.item() / (info.channels * IMAGE_SIDE**2))
            progress(step, steps, f"{psnr:.1f} dB, KL {divergence.item():.0f}")
    return generator.eval().requires_grad_(False)


def held_out_psnr(generator: ConditionalGenerator, options: GeneratorTraining) -> float:
    """Mean of `latent_psnr`, in dB, over the first `HELD_OUT` test images of the generator's dataset.

    Raises:
        DataError: The dataset cannot be had.
    """
    dataset = _dataset(options)
    images, labels = dataset.test_images[:HELD_OUT], dataset.test_labels[:HELD_OUT]
    return float(latent_psnr(generator, images, labels).mean())


def latent_psnr(
    generator: ConditionalGenerator,
    images: ImageBatch,
    labels: Labels,
    *,
    steps: int = 500,
    lr: float = 0.05,
) -> Float[Tensor, " batch"]:
    """How near the generator comes to images that are known: the ceiling of any search in its latent space.

    Args:
        generator: The generator.
        images: Held-out images in [0, 1], shape ``(batch, channels, 32, 32)``.
        labels: Their classes.
        steps: Steps of Adam on the latent vectors, from zero.
        lr: Its learning rate, which falls to zero linearly.

    Returns:
        PSNR in dB of the best latent vector found for each image.
    """
    z = torch.zeros(len(images), generator.info.latent, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    target = images[:, : generator.info.channels]
    best = torch.full((len(images),), torch.inf)
    for _ in range(steps):
        error = (generator(z, labels) - target).square().flatten(1).mean(1)
        best = torch.minimum(best, error.detach())
        optimizer.zero_grad()
        torch.autograd.backward(error.sum())
        optimizer.step()
        schedule.step()
    return -10 * best.log10()


def write_samples(generator: ImageGenerator, path: Path, *, columns: int = 10, seed: int = 0) -> None:
    """Writes a PNG with a row of samples for each of the first ten classes.

    Raises:
        ConfigError: The file cannot be written.
    """
    rows = min(generator.classes, 10)
    labels = torch.arange(rows).repeat_interleave(columns)
    z = torch.randn(len(labels), generator.latent, generator=rng.generator(seed, "samples"))
    with torch.no_grad():
        images = generator(z, labels).unflatten(0, (rows, columns))
    _, height, width = generator.shape
    grid = images.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, -1)
    picture = Image.fromarray((grid * 255).round().byte().squeeze(2).numpy())
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    try:
        write_atomically(path, file.getvalue())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from error


def _dataset(options: GeneratorTraining) -> Dataset:
    return data.load(options.data, root=options.data_root, size=IMAGE_SIDE)


def _info(options: GeneratorTraining, dataset: Dataset) -> GeneratorInfo:
    return GeneratorInfo(
        dataset=options.data,
        classes=dataset.spec.classes,
        channels=1 if _is_gray(dataset.train_images) else dataset.spec.shape[0],
        latent=options.latent,
        width=options.width,
        seed=options.seed,
        command=options.command,
    )


def _is_gray(images: Images) -> bool:
    """Whether color channels, by a look at the first images, only repeat one."""
    some = images[:100]
    return bool((some == some[:, :1]).all())


class _Encoder(nn.Module):
    """The mirror image of the generator: mean and log-variance of z for an image and its class."""

    def __init__(self, info: GeneratorInfo) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(info.channels, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, info.width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.embedding = nn.Embedding(info.classes, 32)
        self.head = nn.Linear(info.width * 16 + 32, 2 * info.latent)

    def forward(self, images: ImageBatch, labels: Labels) -> tuple[Tensor, Tensor]:
        features = torch.cat([self.down(images - 0.5), self.embedding(labels)], dim=1)
        mean, log_variance = self.head(features).chunk(2, dim=1)
        return mean, log_variance


def _elbo_terms(
    generator: ConditionalGenerator,
    encoder: _Encoder,
    images: ImageBatch,
    labels: Labels,
    noise: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Summed squared error and KL divergence of an image, averaged over the batch."""
    mean, log_variance = encoder(images, labels)
    z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=noise)
    error = F.mse_loss(generator(z, labels), images, reduction="sum") / len(images)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / (2 * len(images))
    return error, divergence


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rate: up over the first twentieth, then down by a cosine."""
    rise = max(steps // 20, 1)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1))) / 2


def _batches(count: int, options: GeneratorTraining) -> Iterator[Tensor]:
    for epoch in range(options.epochs):
        order = torch.randperm(count, generator=rng.generator(options.seed, "generator", "order", epoch))
        yield from torch.split(order, options.batch_size)
