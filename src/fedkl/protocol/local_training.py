"""A client's procedure, carried out: the one implementation behind trained federations and audited updates.

It needs `fedkl.data`, which attacks do not see; what they need of it is in differentiable.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkl.data import AUGMENTATIONS, prefetched
from fedkl.errors import TrainingError
from fedkl.keys import Uniform, secure_uniform
from fedkl.protocol.private_gradient import private_gradient
from fedkl.protocol.procedure import Procedure, loss_of
from fedkl.types import Images


class LocalTrainer:
    """A model with its optimizer.

    Args:
        model: What is trained, in the mode in which it is given; changed.
        procedure: How.
        public: Its parameters that are sent, by name.
        private: Its other parameters.
        uniform: Where noise comes from, if the procedure adds any: a real client's from the operating system.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        procedure: Procedure,
        public: Mapping[str, nn.Parameter],
        private: Mapping[str, nn.Parameter],
        uniform: Uniform = secure_uniform,
    ) -> None:
        self._model = model
        self._procedure = procedure
        self._public = dict(public)
        self._private = dict(private)
        self._uniform = uniform
        self.named = self._public | self._private
        self.optimizer = self._new_optimizer()

    def train(self, batches: Iterable[tuple[Tensor, Tensor]], *, samples: int | None = None) -> list[Tensor]:
        """A step for each batch, on from the optimizer's present state; returns the loss of each.

        FedProx pulls towards the weights that the model has when this is called.

        Args:
            batches: Images and labels.
            samples: How many images the client has; needed where they are clipped one by one.
        """
        start = [parameter.detach().clone() for parameter in self._anchored()]
        losses = []
        for images, labels in batches:
            self.optimizer.zero_grad()
            losses.append(self._backward(images, labels, samples=samples))
            self._pull_towards(start)
            self.optimizer.step()
        return losses

    def _backward(self, images: Tensor, labels: Tensor, *, samples: int | None) -> Tensor:
        """Gives the parameters the gradient of one batch, and returns its loss."""
        if self._procedure.per_example is not None:
            return self.private_backward(images, labels, samples=samples)
        loss = self.loss(images, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def private_backward(self, images: Tensor, labels: Tensor, *, samples: int | None) -> Tensor:
        """Gives all parameters, private ones too, the gradient of images that are clipped one by one.

        Private parameters are not sent, but later public gradients depend on them.

        Returns:
            The batch's mean loss, 0 of an empty one.

        Raises:
            TrainingError: See `private_gradient`; or it is not said how many images the client has.
        """
        how = self._procedure.per_example
        if how is None or samples is None:
            raise TrainingError("LocalTrainer: expected per_example and the client's number of samples.")
        gradient, loss = private_gradient(
            self._model,
            images,
            labels,
            how=how,
            expected=samples * self._procedure.sampling_rate(samples),
            loss=loss_of,
            uniform=self._uniform,
            half=self._procedure.precision == "bfloat16",
        )
        for name, parameter in self._model.named_parameters():
            parameter.grad = gradient.get(name)
        return loss

    def step_private(self) -> None:
        """The private parameters' step where a gradient is sent, with those that they were given."""
        for parameter in self._public.values():
            parameter.grad = None  # parameters without a gradient are left alone
        if self._private:
            self.optimizer.step()

    def train_private(self, loss: Tensor) -> None:
        """The private parameters' own step where a gradient is sent; the public ones step on the server."""
        trained = [parameter for parameter in self._private.values() if parameter.requires_grad]
        if trained:
            self.optimizer.zero_grad()
            loss.backward(inputs=trained)  # type: ignore[no-untyped-call]
            self.optimizer.step()  # parameters without a gradient are left alone

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of one batch.

        Raises:
            TrainingError: The model cannot train on a single image.
        """
        half = self._procedure.precision == "bfloat16"
        try:
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
                return loss_of(self._model(images), labels)
        except ValueError as error:
            if len(images) > 1:
                raise
            raise TrainingError(
                f"The model cannot train on a batch of one sample ({error}). Choose a batch_size that leaves "
                f"no client with a last batch of one, now {self._procedure.batch_size}, or a norm that does "
                "not need a batch."
            ) from error

    def _anchored(self) -> list[nn.Parameter]:
        """What FedProx keeps near the global model."""
        if not self._procedure.proximal:
            return []
        return [parameter for parameter in self._public.values() if parameter.requires_grad]

    def _pull_towards(self, start: Sequence[Tensor]) -> None:
        for parameter, global_value in zip(self._anchored(), start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - global_value, alpha=self._procedure.proximal)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        how = self._procedure
        groups: list[dict[str, Any]] = [
            {"params": list(self._public.values()), "weight_decay": how.decay(private=False)},
            {"params": list(self._private.values()), "weight_decay": how.decay(private=True)},
        ]
        groups = [group for group in groups if group["params"]]
        if how.optimizer == "adam":
            return torch.optim.Adam(groups, lr=how.lr)
        # The fused step walks memory, not indexes: a momentum from a checkpoint is laid out as contiguous.
        # And it takes floating-point numbers only.
        fused = all(p.is_contiguous() and p.is_floating_point() for group in groups for p in group["params"])
        return torch.optim.SGD(
            groups, lr=how.lr, momentum=how.momentum, nesterov=how.momentum > 0, fused=fused
        )


def batches_of(
    images: Images,
    labels: Tensor,
    parts: Iterable[Tensor],
    *,
    augmentation: str,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as they are trained on.

    Args:
        images: A store, or a tensor.
        labels: Of all of its images.
        parts: Indexes of each batch.
        augmentation: By name.
        generator: Of the augmentation; a CPU generator.
    """
    augment, parts = AUGMENTATIONS[augmentation], list(parts)
    for index, batch in zip(parts, prefetched(images, parts), strict=True):
        yield augment(batch, generator) if len(batch) else batch, labels[index]
