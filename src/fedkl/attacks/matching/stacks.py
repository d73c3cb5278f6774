"""Tensors of many problems, stacked; those that problems share are held once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedkl.attacks.memory import size_of


class Stacks(Mapping[str, Tensor]):
    """By name one tensor for every problem, stacked along the first dimension.

    Restarts of one observation, and observations of one public network, have most of their tensors in
    common. An item of this mapping is as long as there are problems, and is made when it is asked for.

    Args:
        tensors: Of each name one for every problem; those at the same place in memory are held once.
        dtype: Of what is floating-point.
    """

    def __init__(self, tensors: Mapping[str, Sequence[Tensor]], *, dtype: torch.dtype) -> None:
        self._values: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor | None] = {}  # of `_values`, for each problem; None: its own number
        for name, each in tensors.items():
            distinct = {_place(tensor): tensor for tensor in each}
            numbers = {place: number for number, place in enumerate(distinct)}
            values = torch.stack([_converted(tensor, dtype) for tensor in distinct.values()])
            rows = torch.tensor([numbers[_place(tensor)] for tensor in each], device=values.device)
            self._values[name] = values
            self._rows[name] = None if len(distinct) == len(each) else rows

    def __getitem__(self, name: str) -> Tensor:
        rows = self._rows[name]
        return self._values[name] if rows is None else self._values[name][rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def at(self, index: Tensor) -> dict[str, Tensor]:
        """The tensors of the problems of these indexes, stacked; a problem may come twice."""
        return {
            name: values[index if (rows := self._rows[name]) is None else rows[index]]
            for name, values in self._values.items()
        }

    def first(self, name: str) -> Tensor:
        """Of the first problem; a view."""
        return self._values[name][0]

    @property
    def bytes(self) -> int:
        """What is held."""
        return size_of(self._values.values())

    @property
    def bytes_of_one(self) -> int:
        """What one problem's tensors take."""
        return size_of(values[0] for values in self._values.values())


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)
