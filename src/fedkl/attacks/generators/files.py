"""Class-conditional image generators, the prior that GGL searches: our own, and BigGAN-deep."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkl.attacks.generators.biggan import BigGANDeep
from fedkl.attacks.generators.biggan_files import load_biggan
from fedkl.errors import AttackError, ConfigError, gathered, shown
from fedkl.files import read_file, write_atomically
from fedkl.formats import check_version, version_of
from fedkl.parsing import parse_json_object, parse_tensors
from fedkl.types import ImageBatch, Labels, NamedTensors
from fedkl.update import TensorSpec, check_tensors

SHIPPED = ("mnist", "cifar10")
"""Generators that travel inside the package; see docs/generators.md."""

IMAGE_SIDE = 32
"""Height and width of what our own generators draw, in pixels."""

_ARCHITECTURE = "deconvolution-32"
_NAME, _VERSION = "fedkl-generator", 1
_EMBEDDING = 32
_CHANNELS = (64, 32)
_REMEDY = "Train one: `fedkl generator train --data NAME --out FILE`."
_MAX_BYTES = 2**30  # of a file; the widest generator takes half


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
            f"{name}: expected 1 to {most}, got {values[name]!r:.50}"
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

    @property
    def latent(self) -> int:
        """Length of the latent vector."""
        return self.info.latent

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.info.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return self.info.channels, IMAGE_SIDE, IMAGE_SIDE

    def fits(self, image_shape: tuple[int, int, int], classes: int) -> bool:
        """Whether it can stand for images of this shape and number of classes."""
        channels, *side = image_shape
        same = self.info.channels in (1, channels)
        return same and side == [IMAGE_SIDE, IMAGE_SIDE] and classes == self.info.classes


ImageGenerator = ConditionalGenerator | BigGANDeep
"""Draws images in [0, 1] from latent vectors and classes; has `latent`, `classes`, `shape` and `fits`."""


def save_generator(generator: ConditionalGenerator, path: Path) -> None:
    """Writes a generator as float16 (half the size; a pixel moves by less than 0.01), atomically.

    Raises:
        ConfigError: The file cannot be written.
    """
    tensors = {name: t.detach().half().contiguous() for name, t in generator.state_dict().items()}
    text = json.dumps({"architecture": _ARCHITECTURE, **asdict(generator.info)}, sort_keys=True)
    metadata = {"format": f"{_NAME}-{_VERSION}", "generator": text, "digest": _digest(text, tensors)}
    try:
        write_atomically(path, safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from error


def load_generator(source: str, *, truncation: float = 1.0) -> ImageGenerator:
    """A generator that travels inside the package, one from a file, or a BigGAN-deep from a folder.

    Args:
        source: One of `SHIPPED`, or a path; see `load_biggan` for folders.
        truncation: Of a BigGAN-deep; the others have none.

    Returns:
        In evaluation mode, without gradients of its weights.

    Raises:
        ConfigError: Files are missing, damaged, altered, or no generator of this version; a truncation other
            than 1 for a generator that has none.

    >>> load_generator("mnist").classes
    10
    """
    if source not in SHIPPED and os.path.isdir(source):  # noqa: PTH112 (of any text, also of a name too long)
        return load_biggan(Path(source), truncation=truncation)
    if truncation != 1:
        raise ConfigError(f"generator: {source!r} has no truncation, got {truncation}. Leave it at 1.")
    return _load_own(source)


def generator_for(
    source: str | None, *, image_shape: tuple[int, int, int], classes: int, truncation: float = 1.0
) -> ImageGenerator:
    """The generator to search for images of this shape and number of classes.

    Args:
        source: Which, see `load_generator`; None: the only one of `SHIPPED` that fits.
        image_shape: ``(channels, height, width)``.
        classes: Number of classes.
        truncation: See `load_generator`.

    Raises:
        AttackError: It does not fit; or None was given, and none or several of the package do.
        ConfigError: See `load_generator`.
    """
    wanted = f"images of shape {image_shape} in {classes} classes"
    remedy = "`fedkl generator train --data NAME --out FILE` makes one; give FILE as GGL's generator."
    if source is not None:
        generator = load_generator(source, truncation=truncation)
        if not generator.fits(image_shape, classes):
            raise AttackError(
                f"GGL: the generator {source!r} draws images of shape {generator.shape} in "
                f"{generator.classes} classes, expected {wanted}. {remedy}"
            )
        return generator
    fitting = {name: own for name in SHIPPED if (own := _load_own(name)).fits(image_shape, classes)}
    if len(fitting) > 1:
        raise AttackError(
            f"GGL: {' and '.join(fitting)} both draw {wanted}. Give as GGL's generator the one whose "
            "training images are most like the clients'."
        )
    if not fitting:
        raise AttackError(f"GGL: no generator in the package draws {wanted}. {remedy}")
    return next(iter(fitting.values()))


def _load_own(source: str) -> ConditionalGenerator:
    info, tensors = _parse(source, _read(source))
    with torch.device("meta"):  # a small file may claim to be a large generator
        generator = ConditionalGenerator(info)
    shapes = {name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()}
    specs = {name: TensorSpec(shape=shape, dtype=torch.float16) for name, shape in shapes.items()}
    subject = f"generator: {source!r} does not fit itself."
    check_tensors(tensors, specs, subject=subject, remedy=_REMEDY, error=ConfigError)
    generator.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return generator.eval().requires_grad_(False)


def _read(source: str) -> bytes:
    if source in SHIPPED:
        folder = resources.files("fedkl.attacks.generators") / "weights"
        return (folder / f"{source}.safetensors").read_bytes()
    try:
        return read_file(Path(source), limit=_MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"generator: {source!r} is neither one of {', '.join(SHIPPED)} nor a file that can be read "
            f"({reason}). {_REMEDY}"
        ) from error


def _parse(source: str, data: bytes) -> tuple[GeneratorInfo, dict[str, Tensor]]:
    try:
        tensors, beside = parse_tensors(data)
        version = version_of(beside.get("format"), name=_NAME)  # the first ones do not say
        check_version(version, source=f"generator: {source!r}", reads=_VERSION)
        text, digest = beside["generator"], beside["digest"]
        fields = parse_json_object(text)
        architecture = fields.pop("architecture")
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"generator: {source!r} is damaged, or no generator that fedkl wrote. {_REMEDY}"
        ) from error
    if digest != _digest(text, tensors):
        raise ConfigError(f"generator: {source!r} was altered after it was written. {_REMEDY}")
    if architecture != _ARCHITECTURE:
        raise ConfigError(
            f"generator: {source!r} is of architecture {shown(architecture)}, expected "
            f"'{_ARCHITECTURE}'. {_REMEDY}"
        )
    if {name: type(value) for name, value in fields.items()} != _KINDS:
        raise ConfigError(f"generator: {source!r} has other fields than this fedkl reads. {_REMEDY}")
    return GeneratorInfo(**fields), tensors


_KINDS = {
    "dataset": str,
    "classes": int,
    "channels": int,
    "latent": int,
    "width": int,
    "seed": int,
    "command": str,
}


def _digest(text: str, tensors: NamedTensors) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
