"""What is audited: somebody's model, their images, and what a client of theirs does with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from fedkl import rng
from fedkl.auditing.fingerprint import fingerprint, fingerprint_of
from fedkl.errors import ConfigError, DataError, gathered, printable, shown
from fedkl.locking.copying import copied
from fedkl.modelfile import read_tensors
from fedkl.models.preprocessing import Standardize
from fedkl.protocol import Procedure, trained_parameters
from fedkl.run_records import Word
from fedkl.update import TensorSpec, check_tensors

LocalLoop = Callable[[nn.Module, Tensor, Tensor], object]
"""A training loop of one's own: trains a model, in place, on images and labels."""

_MAX_WEIGHTS = 2**32  # bytes of a file
_LEAST_IMAGES = 40
_NAME = TypeAdapter(Word, config=ConfigDict(strict=True))  # it stands in the audit's files


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model, images with labels, and what a client does with them.

    Attributes:
        model: A function without arguments that builds the network; called more than once.
        images: What the network is called with, before `normalization`: float32, shape ``(images, channels,
            height, width)``, in [0, 1]. Or integer tokens, shape ``(images, length)``: only presence is
            tested then. Best are images that the weights were never trained on: what is asked is what a
            client's next update tells of new images.
        labels: int64, shape ``(images,)``.
        weights: Trained weights: a safetensors file, or tensors by the network's names; all of its
            parameters, and its buffers if it has any. None: those that `model` builds, the same each time.
        procedure: What a client does in a round, and what of it is sent. Or a function that trains: called
            as ``procedure(network, inputs, labels)`` with the network as `model` builds it and inputs as it
            takes them, it trains the network in place; what is sent are the weights.
        images_per_client: How many images a client trains on in a round.
        norm_mode: Whether norms use a batch's statistics while a client trains; a function that trains sets
            the mode itself.
        normalization: Mean and standard deviation per channel, of what is done to images before the network
            sees them; None: nothing is.
        classes: How many there are; 0: the largest label, and one.
        name: What reports call it, in one line.

    Raises:
        ConfigError: Fields are not usable; the message lists all of them.

    >>> images, labels = torch.rand(50, 1, 8, 8), torch.arange(50) % 10
    >>> subject = Subject(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), images=images,
    ...                   labels=labels, procedure=Procedure(algorithm="fedavg", batch_size=8),
    ...                   images_per_client=8)
    >>> subject.classes, subject.is_pictures
    (10, True)
    """

    model: Callable[[], nn.Module]
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    weights: Path | str | Mapping[str, Tensor] | None = field(default=None, repr=False)
    procedure: Procedure | LocalLoop = field(default_factory=Procedure)
    images_per_client: int = 1
    norm_mode: Literal["train", "eval"] = "train"
    normalization: tuple[Sequence[float], Sequence[float]] | None = None
    classes: int = 0
    name: str = "subject"

    def __post_init__(self) -> None:
        problems = self._field_problems()
        if isinstance(self.images, Tensor) and isinstance(self.labels, Tensor):
            problems += _image_problems(self.images) + self._label_problems() + self._normalization_problems()
        if problems:
            raise ConfigError(gathered("Subject is not usable.", problems, "Correct these fields."))
        if not self.classes:
            object.__setattr__(self, "classes", int(self.labels.max()) + 1)

    def _field_problems(self) -> list[str]:
        checks = {
            "model: expected a function that builds the network, e.g. `lambda: Net()`, got "
            + ("a network" if isinstance(self.model, nn.Module) else type(self.model).__name__): (
                callable(self.model) and not isinstance(self.model, nn.Module)
            ),
            "procedure: expected a fedkl.Procedure, or a function that trains, got "
            f"{type(self.procedure).__name__}": (
                isinstance(self.procedure, Procedure) or callable(self.procedure)
            ),
            f"images_per_client: expected at least 1, got {self.images_per_client}": (
                self.images_per_client >= 1
            ),
            f"norm_mode: expected 'train' or 'eval', got {self.norm_mode!r}": (
                self.norm_mode in ("train", "eval")
            ),
            f"classes: expected at least 0, got {self.classes}": self.classes >= 0,
            "name: expected text of one line and at most 1,000 characters, got "
            + (shown(self.name) if isinstance(self.name, str) else type(self.name).__name__): (
                _is_name(self.name)
            ),
            "images, labels: expected tensors, got "
            f"{type(self.images).__name__} and {type(self.labels).__name__}; images[:] makes one of a store, "
            "and `images, labels = fedkl.data.as_tensors(dataset)` two of a torch Dataset": (
                isinstance(self.images, Tensor) and isinstance(self.labels, Tensor)
            ),
        }
        return [problem for problem, fine in checks.items() if not fine]

    def _label_problems(self) -> list[str]:
        expected, got = tuple(self.images.shape[:1]), tuple(self.labels.shape)
        if got != expected or self.labels.dtype != torch.int64:
            return [
                f"labels: expected int64 of shape {expected}, one of each image, got {self.labels.dtype} of "
                f"shape {got}"
            ]
        problems = []
        if bool((self.labels < 0).any()):
            problems.append("labels: expected values of at least 0, got some below")
        if self.classes > 0 and bool((self.labels >= self.classes).any()):
            problems.append(
                f"labels: expected 0 .. {self.classes - 1}, as there are {self.classes} classes, got some "
                "above"
            )
        return problems

    def _normalization_problems(self) -> list[str]:
        if self.normalization is None:
            return []
        if not self.is_pictures:
            return ["normalization: expected None where images are tokens"]
        problem = "normalization: expected a mean and a positive std for every channel, e.g. ((0.5,), (0.5,))"
        try:
            channels = len(Standardize(*self.normalization).mean)
        except (ConfigError, TypeError):
            return [problem]
        if self.images.dim() == 4 and channels != self.images.shape[1]:
            return [f"{problem}, got them for {channels} and images of {self.images.shape[1]} channels"]
        return []

    @property
    def is_pictures(self) -> bool:
        """Whether images are pictures, which can be reconstructed and shown; else they are tokens."""
        return self.images.is_floating_point()

    @property
    def has_own_loop(self) -> bool:
        """Whether clients train with a function of the user's."""
        return not isinstance(self.procedure, Procedure)

    def build(self, *, trained: bool = True) -> nn.Module:
        """The network as its owner builds and calls it, with the weights that clients receive.

        Args:
            trained: Whether to load the weights.

        Raises:
            ConfigError: It cannot be built, or the weights do not fit it.
        """
        try:
            # Without `weights` too, all networks that are built are the same: an update is a difference.
            with rng.seeded(0):
                network = self.model()
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"Subject.model: raised {type(error).__name__} ({printable(str(error))}). Give a function "
                "without arguments that returns the network, on the CPU."
            ) from error
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"Subject.model: expected a function that returns an nn.Module, got {type(network).__name__}."
            )
        if any(nn.parameter.is_lazy(each) for each in (*network.parameters(), *network.buffers())):
            raise ConfigError(
                "Subject.model: expected a network whose parameters have shapes, got some that have none yet "
                "(LazyLinear, say). Call it once with an image, in the function that returns it."
            )
        # A copy, as the function may give the same one again.
        network = copied(network, subject="Subject.model", error=ConfigError).cpu()
        if trained:
            _load_(network, self.weights)
        return network

    def classifier(self, network: nn.Module | None = None) -> nn.Module:
        """The same as attackers call it: images in [0, 1] go in, class scores come out.

        Names of modules and tensors are those of the network.

        Args:
            network: One that `build` built, changed in place; None: a new one.
        """
        network = self.build() if network is None else network
        if self.normalization is not None:
            network.register_forward_pre_hook(_StandardizeFirst(Standardize(*self.normalization)))
        network.register_forward_hook(_scores_last)
        return network

    def fingerprint(self) -> str:
        """Tells this subject from another: SHA-256 of network, images, labels and procedure, hexadecimal.

        Of a network its tensors count, its modules with their settings, and its code. Of a function that
        trains its code, with the variables, functions and classes of yours that it names, and what these
        name. Not what is installed, nor what code reads or imports only while it runs; see fingerprint.py.
        """
        return fingerprint(
            self.build(),
            trains=self.procedure,
            settings=self.normalization,
            tensors={"images": self.images, "labels": self.labels},
        )

    def images_fingerprint(self) -> str:
        """Tells these images and labels from others: SHA-256, hexadecimal."""
        return fingerprint_of({"images": self.images, "labels": self.labels})

    def training_fingerprint(self) -> str:
        """Tells what is trained, and how, from something else: SHA-256, hexadecimal.

        As `fingerprint`, without images and without the values of the network's tensors: one that was trained
        further is the same. Which of its parameters are frozen counts.
        """
        return fingerprint(
            self.build(trained=False),
            trains=self.procedure,
            settings=self.normalization,
            tensors={},
            values=False,
        )

    def inputs(self, images: Tensor) -> Tensor:
        """Images as the network takes them, normalized."""
        if self.normalization is None:
            return images
        found: Tensor = Standardize(*self.normalization)(images)
        return found

    def check(self) -> None:
        """Builds the network and calls it with two images.

        Raises:
            ConfigError: It cannot be built, or does not fit its weights.
            DataError: It cannot be called with the images, returns no class scores, has numbers that are not
                finite, or nothing that could be trained.
        """
        network = self.classifier()
        network.eval()  # which may return nothing: a user may have overridden `train`
        broken = [name for name, tensor in network.named_parameters() if not tensor.isfinite().all()]
        if broken:
            raise DataError(
                f"{self.name}: {shown(broken[0])} of the network has numbers that are not finite. Give "
                "weights of a training that did not diverge."
            )
        try:
            with torch.no_grad():
                scores = network(self.images[:2])
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{self.name}: the network cannot be called with images of shape "
                f"{tuple(self.images.shape[1:])} ({type(error).__name__}: {printable(str(error))}). "
                f"{self._channels_remedy() or 'Give images as it takes them, on the CPU.'}"
            ) from error
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (2, self.classes):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise DataError(
                f"{self.name}: expected class scores of shape (2, {self.classes}) for two images, got {got}. "
                "Return the scores, or an object with a field `logits`; set `classes` to their number."
            )
        frozen = any(True for _ in network.parameters()) and not trained_parameters(network)
        if frozen and isinstance(self.procedure, Procedure):
            raise DataError(
                f"{self.name}: all parameters of the network are frozen (requires_grad=False), so clients "
                "would train nothing. Freeze those only that they do not train."
            )

    def _channels_remedy(self) -> str | None:
        """What to do where the network takes gray and the images are in color, or the reverse."""
        images = self.images[:2]
        channels = images.shape[1] if self.is_pictures else 0
        if channels not in (1, 3):
            return None
        wanted = 4 - channels
        given = {3: "images.expand(-1, 3, -1, -1)", 1: "images.mean(1, keepdim=True)"}[wanted]
        other = images.expand(-1, 3, -1, -1) if channels == 1 else images.mean(1, keepdim=True)
        with torch.no_grad(), contextlib.suppress(Exception, SystemExit):  # it may be about something else
            network = self.build()
            network.eval()
            network(other)
            return f"It takes images with channels={wanted}: give {given}, or load them so."
        return None


def _image_problems(images: Tensor) -> list[str]:
    pictures = images.dtype == torch.float32 and images.dim() == 4
    tokens = images.dtype in (torch.int32, torch.int64) and images.dim() == 2
    if not pictures and not tokens:
        return [
            "images: expected float32 of shape (images, channels, height, width), or int64 tokens of shape "
            f"(images, length), got {images.dtype} of shape {tuple(images.shape)}"
        ]
    problems = []
    if len(images) < _LEAST_IMAGES:
        problems.append(f"images: expected at least {_LEAST_IMAGES}, got {len(images)}")
    if not bool(torch.isfinite(images).all()):
        problems.append("images: expected finite values, got NaN or infinite ones")
    elif tokens and bool((images < 0).any()):
        problems.append("images: expected tokens of at least 0, got some below")
    elif pictures and not bool(((images >= 0) & (images <= 1)).all()):
        side = "some below 0" if bool((images < 0).any()) else "some above 1"
        problems.append(
            f"images: expected values in [0, 1], got {side}. Divide bytes by 255; give images as they are "
            "before normalization, and its mean and standard deviation as `normalization`"
        )
    return problems


def _is_name(name: object) -> bool:
    try:
        _NAME.validate_python(name)
    except ValidationError:
        return False
    return True


class _StandardizeFirst:
    """A forward pre-hook; an object, so that copies of the network have a copy of it."""

    def __init__(self, standardize: Standardize) -> None:
        self._standardize = standardize

    def __call__(self, network: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._standardize.to(args[0].device, args[0].dtype)(args[0]), *args[1:])


def _scores_last(network: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """A forward hook: class scores out of what networks of other libraries return."""
    return getattr(output, "logits", output)


def _load_(network: nn.Module, weights: Path | str | Mapping[str, Tensor] | None) -> None:
    if weights is None:
        return
    if isinstance(weights, Mapping):
        source, tensors = "a mapping", dict(weights)
    else:
        source = str(weights)
        tensors, _ = read_tensors(
            weights,
            limit=_MAX_WEIGHTS,
            problem=f"Subject.weights: {source} cannot be read",
            remedy="Give tensors by name, or what safetensors.torch.save_file wrote of them.",
        )
    own = network.state_dict()
    check_tensors(
        tensors,
        {name: TensorSpec.of(tensor) for name, tensor in own.items()},
        subject=f"Subject.weights: {source} does not fit the network.",
        remedy="Give the weights of this architecture, with buffers.",
        error=ConfigError,
    )
    network.load_state_dict(tensors)
