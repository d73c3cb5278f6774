"""Updates that another system saved, and whether they fit a subject: asked before any attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from torch import Tensor

from fedkl.errors import ConfigError
from fedkl.modelfile import read_tensors
from fedkl.recordingfile import Recording

RecordedKind = Literal["gradient", "difference", "weights"]

_MAX_UPDATE = 2**34  # bytes of a file
_IMAGES = ("num-examples", "num_examples")  # Flower's name for their number, and what a NumPyClient's becomes


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedUpdate:
    """What a client sent, as a file holds it.

    **As private as the client's data**: images can be rebuilt from it.

    Attributes:
        tensors: By the file's names, which `fits` finds again in the subject's network.
        kind: ``"gradient"``: of the loss, as `backward` leaves it. ``"difference"``: the weights after local
            training minus those before. ``"weights"``: those after it.
        received: The weights that the client was sent, where they were recorded too; by the file's names.
        images: How many it trained on, where it said so.
        source: Where the tensors are from.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    kind: RecordedKind = "gradient"
    received: Mapping[str, Tensor] | None = field(default=None, repr=False)
    images: int | None = None
    source: str = "tensors"

    def __post_init__(self) -> None:
        if self.kind not in get_args(RecordedKind):
            raise ConfigError(
                f"RecordedUpdate.kind: expected one of {', '.join(get_args(RecordedKind))}, got "
                f"{self.kind!r}."
            )
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    @classmethod
    def read(cls, path: str | Path, *, kind: RecordedKind = "gradient") -> RecordedUpdate:
        """A safetensors file.

        Args:
            path: The file.
            kind: What its tensors are.

        Raises:
            ConfigError: It cannot be read, or there is no such kind.
        """
        tensors, _ = read_tensors(
            path,
            limit=_MAX_UPDATE,
            problem=f"{path}: not an update that can be read",
            remedy="Give a safetensors file: safetensors.torch.save_file(tensors, path).",
        )
        return cls(tensors=tensors, kind=kind, source=str(path))

    @classmethod
    def from_recording(cls, folder: str | Path) -> RecordedUpdate:
        """One client's round that `fedkl.flower.RecordingMod` wrote: weights before and after.

        Args:
            folder: The round's, ``…/node-<node id>/round-<round>``.

        Raises:
            ConfigError: It cannot be read, or what it holds was masked.
        """
        recording = Recording.read(Path(folder))
        if recording.masked:
            raise ConfigError(
                f"{folder}: refused, because this update was masked before it was recorded: its words say "
                "nothing. Put RecordingMod after MaskMod in the list of mods to record the update itself, "
                "which the server does not see."
            )
        metrics = recording.about.get("metrics", {}).values()
        images = [record.get(name) for record in metrics for name in _IMAGES]
        counts = [number for number in images if type(number) is int and number > 0]
        return cls(
            tensors=recording.sent,
            kind="weights",
            received=recording.received,
            images=counts[0] if counts else None,
            source=str(folder),
        )
