"""Updates of clients, read by a server and averaged with a sound one."""

from __future__ import annotations

import torch

from fedkl.federated import weighted_average
from fedkl.update import PublicSchema, PublicUpdate, TensorSpec
from tests.fuzzing.contract import Finding
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import Surface


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "conv.weight": torch.linspace(-1, 1, 18).reshape(2, 1, 3, 3),
        "fc.bias": torch.ones(5, dtype=torch.float64),
        "half": torch.full((2, 2), 0.5, dtype=torch.float16),
        "norm.num_batches_tracked": torch.tensor(7),
        "flag": torch.tensor([True, False]),
    }


class Updates(Surface):
    """`PublicUpdate.from_bytes`; what is accepted is averaged, and the average is finite."""

    name = "updates"
    form = "safetensors"
    quick = 800
    target = "fedkl.update.PublicUpdate.from_bytes"

    def __init__(self) -> None:
        weights = _tensors()
        gradient = {"conv.weight": weights["conv.weight"]}
        self._sound = [
            PublicUpdate(schema=_schema("weights", weights), tensors=weights, num_samples=3, round=2),
            PublicUpdate(schema=_schema("gradient", gradient), tensors=gradient, num_samples=3, round=2),
        ]

    def seeds(self) -> list[bytes]:
        """One update of each kind."""
        return [update.to_bytes() for update in self._sound]

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Reads the bytes under each schema."""
        for sound in self._sound:
            self.attempt(lambda s=sound: self._receive(data, s))
        PublicUpdate.from_bytes(data, schema=self._sound[0].schema)

    def _receive(self, data: bytes, sound: PublicUpdate) -> None:
        came = PublicUpdate.from_bytes(data, schema=sound.schema)
        for updates in ((sound, came), (came, sound), (came,)):
            average = weighted_average(updates)
            if not all(tensor.isfinite().all() for tensor in average.values()):
                raise Finding("the average of accepted updates is not finite")


def _schema(kind: str, tensors: dict[str, torch.Tensor]) -> PublicSchema:
    return PublicSchema(kind=kind, specs={name: TensorSpec.of(t) for name, t in tensors.items()})
