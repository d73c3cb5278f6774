"""Which tensor of a file is which of a network: by name, without a prefix, or by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedkl.errors import shown
from fedkl.protocol import trained_parameters


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How the tensors of a file are called in a network.

    Attributes:
        names: The network's name of each tensor of the file that has one, by the file's.
        how: What was done to find them; empty where all names are the network's own.
        missing: Names of trained parameters that the file does not hold.
        missing_buffers: The same of buffers.
        unexpected: Names in the file that the network does not have.
        shapes: What is wrong with shapes, one sentence each.
    """

    names: Mapping[str, str] = field(repr=False)
    how: str = ""
    missing: tuple[str, ...] = ()
    missing_buffers: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors by the network's names; others are left out."""
        return {own: tensors[name] for name, own in self.names.items() if name in tensors}


def naming(network: nn.Module, tensors: Mapping[str, Tensor]) -> Naming:
    """Finds out how a file's tensors are called in a network.

    Numbers count the tensors as the network lists them: all of its state, its parameters, or those that are
    trained. A prefix is what wrappers put before all names, in the file (``module.``) or in the network.
    """
    own = network.state_dict()
    parameters, trained = [name for name, _ in network.named_parameters()], [*trained_parameters(network)]
    names, how = _numbered(own, parameters, trained, tensors)
    if not names:
        names, how = _prefixed(own, tensors)
    known = set(names.values())
    absent = [name for name in own if name not in known]
    return Naming(
        names=names,
        how=how,
        missing=tuple(name for name in absent if name in trained),
        missing_buffers=tuple(name for name in absent if name not in parameters),
        unexpected=tuple(name for name in tensors if name not in names),
        shapes=tuple(
            f"{shown(name)} has shape {tuple(tensors[name].shape)}, expected {tuple(own[mine].shape)}"
            for name, mine in names.items()
            if tensors[name].shape != own[mine].shape
        ),
    )


def _numbered(
    own: Mapping[str, Tensor],
    parameters: Sequence[str],
    trained: Sequence[str],
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, str], str]:
    if not tensors or {*tensors} != {str(number) for number in range(len(tensors))} or {*tensors} <= {*own}:
        return {}, ""
    orders = {"its state": [*own], "its parameters": parameters, "its trained parameters": trained}
    for what, order in orders.items():
        if len(order) == len(tensors):
            names = {str(number): name for number, name in enumerate(order)}
            return names, f"numbers instead of names, read in the order of {what}"
    return {}, ""


def _prefixed(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], str]:
    """The prefix, of the file's names or of the network's, with which most names agree."""
    options = {("", "")}
    for name in tensors:
        options |= {(name[: -len(mine)], "") for mine in own if name.endswith(f".{mine}")}
        options |= {("", mine[: -len(name)]) for mine in own if mine.endswith(f".{name}")}
    best: dict[str, str] = {}
    how = ""
    for before, added in sorted(options, key=lambda pair: (len(pair[0]) + len(pair[1]), pair)):
        names = {n: added + n[len(before) :] for n in tensors if n.startswith(before)}
        names = {name: mine for name, mine in names.items() if mine in own}
        if len(names) > len(best):
            best = names
            how = f"names without the prefix {shown(before)}" if before else ""
            how = f"names with the prefix {shown(added)}" if added else how
    return best, how
