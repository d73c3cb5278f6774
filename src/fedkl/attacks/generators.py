"""Class-conditional image generators: the prior that GGL searches. Safetensors files, never pickle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from fedkl.errors import ConfigError, gathered
from fedkl.files import write_atomically
from fedkl.types import ImageBatch, Labels, NamedTensors

SHIPPED = ("mnist", "cifar10")
"""Generators that travel inside the package; see docs/generators.md."""

IMAGE_SIDE = 32
"""Height and width of what a generator draws, in pixels."""

_ARCHITECTURE = "deconvolution-32"
_EMBEDDING = 32
_CHANNELS = (64, 32)
_REMEDY = "Train one: `fedkl generator train --data NAME --out FILE`."


@dataclass(frozen=True, kw_only=True)
class GeneratorInfo:
    """What a generator is and where it came from.

    Attributes:
        dataset: Whose training images it has seen.
        classes: Number of classes.
        channels: 1 or 3; gray images serve color networks too, repeated.
        latent: Length of the latent vector.
        width: Channels of the 4×4 map that the latent vector is spread on.
        seed: Of its training.
        command: What trained it.

    Raises:
        ConfigError: A number is out of its range.
    """

    dataset: str
    classes: int
    channels: int
    latent: int = 64
    width: int = 96
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        limits = {"classes": 10_000, "channels": 3, "latent": 4096, "width": 4096}
        values = asdict(self)
        problems = [
            f"{name}: expected 1 to {most}, got {values[name]!r}"
            for name, most in limits.items()
            if type(values[name]) is not int or not 1 <= values[name] <= most
        ]
        if problems:
            raise ConfigError(gathered("This generator cannot be built.", problems, _REMEDY))


class ConditionalGenerator(nn.Module):
    """Draws 32×32 images from a latent vector and a class: a linear layer, then three deconvolutions.

    Small on purpose: the search evaluates it 25,000 times for each image.

    Args:
        info: Its sizes.

    Shapes:
        Latent vectors ``(batch, latent)``, drawn from N(0, I); labels ``(batch,)``; images
        ``(batch, channels, 32, 32)`` in [0, 1].

    Source:
        Own. GGL searched a WGAN-GP at this size and BigGAN-deep-256 on ILSVRC; see docs/generators.md for
        what differs and why.
    """

    def __init__(self, info: GeneratorInfo) -> None:
        super().__init__()
        self.info = info
        self.embedding = nn.Embedding(info.classes, _EMBEDDING)
        self.spread = nn.Linear(info.latent + _EMBEDDING, info.width * 16)
        self.up1 = nn.ConvTranspose2d(info.width, _CHANNELS[0], 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(_CHANNELS[0], _CHANNELS[1], 4, stride=2, padding=1)
        self.up3 = nn.ConvTranspose2d(_CHANNELS[1], info.channels, 4, stride=2, padding=1)
        self.act = nn.SiLU()

    def forward(self, z: Float[Tensor, "batch latent"], labels: Labels) -> ImageBatch:
        """Images in [0, 1] for latent vectors and classes."""
        x = self.act(self.spread(torch.cat([z, self.embedding(labels)], dim=1)))
        x = self.act(self.up1(x.unflatten(1, (self.info.width, 4, 4))))
        images: Tensor = self.up3(self.act(self.up2(x))).sigmoid()
        return images

    def fits(self, image_shape: tuple[int, int, int], classes: int) -> bool:
        """Whether it can stand for images of this shape and number of classes."""
        channels, *side = image_shape
        same = self.info.channels in (1, channels)
        return same and side == [IMAGE_SIDE, IMAGE_SIDE] and classes == self.info.classes


def save_generator(generator: ConditionalGenerator, path: Path) -> None:
    """Writes a generator as float16 (half the size; a pixel moves by less than 0.01), atomically.

    Raises:
        ConfigError: The file cannot be written.
    """
    tensors = {name: t.detach().half().contiguous() for name, t in generator.state_dict().items()}
    text = json.dumps({"architecture": _ARCHITECTURE, **asdict(generator.info)}, sort_keys=True)
    metadata = {"generator": text, "digest": _digest(text, tensors)}
    try:
        write_atomically(path, safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from error


def load_generator(source: str) -> ConditionalGenerator:
    """A generator that travels inside the package, or one from a file.

    Args:
        source: One of `SHIPPED`, or a path.

    Returns:
        In evaluation mode, without gradients of its weights.

    Raises:
        ConfigError: The file is missing, damaged, altered, or no generator of this version.

    >>> load_generator("mnist").info.dataset
    'mnist'
    """
    file = resources.files("fedkl.attacks") / "weights" / f"{source}.safetensors"
    place = file if source in SHIPPED else Path(source)
    try:
        data = place.read_bytes()
    except OSError as error:
        names = ", ".join(SHIPPED)
        raise ConfigError(
            f"generator: '{source}' is neither one of {names} nor a file that can be read "
            f"({error.strerror}). {_REMEDY}"
        ) from error
    info, tensors = _parse(source, data)
    generator = ConditionalGenerator(info)
    _check_tensors(source, generator.state_dict(), tensors)
    generator.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return generator.eval().requires_grad_(False)


def _parse(source: str, data: bytes) -> tuple[GeneratorInfo, dict[str, Tensor]]:
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        text, digest = metadata["generator"], metadata["digest"]
        fields: dict[str, Any] = json.loads(text)
        architecture = fields.pop("architecture")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"generator: {source} is damaged, or no generator that fedkl wrote. {_REMEDY}"
        ) from error
    if digest != _digest(text, tensors):
        raise ConfigError(f"generator: {source} was altered after it was written. {_REMEDY}")
    if architecture != _ARCHITECTURE:
        raise ConfigError(
            f"generator: {source} is of architecture '{architecture}', expected '{_ARCHITECTURE}'. {_REMEDY}"
        )
    try:
        return GeneratorInfo(**fields), tensors
    except TypeError as error:
        raise ConfigError(f"generator: {source} is of another version of fedkl. {_REMEDY}") from error


def _check_tensors(source: str, expected: NamedTensors, got: NamedTensors) -> None:
    problems = [f"'{name}' is missing" for name in expected.keys() - got.keys()]
    problems += [f"'{name}' is not expected" for name in got.keys() - expected.keys()]
    for name in expected.keys() & got.keys():
        if expected[name].shape != got[name].shape:
            shapes = f"{tuple(got[name].shape)}, expected {tuple(expected[name].shape)}"
            problems.append(f"'{name}' has shape {shapes}")
        elif not bool(torch.isfinite(got[name]).all()):
            problems.append(f"'{name}' has non-finite values")
    if problems:
        raise ConfigError(gathered(f"generator: {source} does not fit itself.", sorted(problems), _REMEDY))


def _digest(text: str, tensors: NamedTensors) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
